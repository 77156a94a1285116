"""Prompts are not computed ahead of what decode instances can take.

Problem: where prefill and decode have instances of their own, prompts that are computed too early
pile up before the decode instances: their readers have a first token and no second one.
Source: our own, from Past-Future's forecast (arXiv 2507.10150, sections 3.2 and 3.3); Mooncake
rejects by the predicted load of its decode side.
Rule: a request may begin its prefill if the peak KV memory of all that are at decode instances, or
on their way there, drawn once from the lengths that ended lately, is at most ``factor`` times what
these instances have, with the newcomer added.  When nothing is on its way one may always begin.
Those that wait begin in an order of their own: while their TTFT lasts the short first, then by
arrival, but one in ten is the oldest of those whose TTFT is over.
Limits: the instances' memories are added up, so one of them may overflow; one scenario per look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from penstock.core.forecast.lengths import LengthHistory
from penstock.core.forecast.occupancy import Occupancy

_LATE_EVERY = 10
_NO_PROMISE = 8.0


class Waiting(NamedTuple):
    """A request that has not begun.

    Attributes:
        arrival: in seconds.
        ttft: promised seconds; None: 8 are assumed.
        row: (prompt, generated, cap) in tokens.
    """

    arrival: float
    ttft: float | None
    row: tuple[int, int, int]


@dataclass(slots=True)
class BackPressure:
    """Holds prompts back by the forecast of the decode instances' memory.

    Attributes:
        rng: of the draws.
        factor: of the memory that the forecast may fill, above 0.
        window: past output lengths kept.
    """

    rng: np.random.Generator
    factor: float = 1.0
    window: int = 1000
    history: LengthHistory = field(init=False)
    _since_late: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            msg = f"back_pressure is {self.factor}; it must be above 0"
            raise ValueError(msg)
        self.history = LengthHistory(self.window)

    def admitted(
        self,
        waiting: Sequence[Waiting],
        ahead: Sequence[tuple[int, int, int]],
        kv_tokens: int,
        now: float,
    ) -> list[int]:
        """Which of those who wait may begin, the first first.

        Args:
            ahead: (prompt, generated, cap) in tokens of those at decode instances or on the way.
            kv_tokens: of all decode instances.
        """
        late = [now > each.arrival + (each.ttft or _NO_PROMISE) for each in waiting]
        order = sorted(
            range(len(waiting)),
            key=lambda i: (late[i], 0 if late[i] else sum(waiting[i].row[:2]), waiting[i].arrival),
        )
        oldest = next((i for i in order if late[i]), None)
        if oldest is not None and self._since_late >= _LATE_EVERY - 1:
            order.remove(oldest)
            order.insert(0, oldest)
        begun = order[: self._fitting([waiting[i].row for i in order], ahead, kv_tokens)]
        lates = [place for place, i in enumerate(begun) if late[i]]
        self._since_late = len(begun) - 1 - lates[-1] if lates else self._since_late + len(begun)
        return begun

    def _fitting(
        self,
        waiting: Sequence[tuple[int, int, int]],
        ahead: Sequence[tuple[int, int, int]],
        kv_tokens: int,
    ) -> int:
        """How many of those who wait, from the first on, fit."""
        rows = np.array([*ahead, *waiting], dtype=np.int64).reshape(-1, 3)
        prompt, generated, cap = rows.T
        lengths = self.history.draw_running(self.rng.random(len(rows)), generated, cap)
        tokens = prompt + np.maximum(generated, 1)
        steps = np.maximum(lengths - np.maximum(generated, 1), 0)
        # A peak that fills the memory is still good.
        count, limit = len(ahead), math.floor(self.factor * kv_tokens) + 1
        future = Occupancy(tokens[:count], steps[np.newaxis, :count], 1)
        number = 0
        for own, until in zip(tokens[count:].tolist(), steps[count:].tolist(), strict=True):
            below = limit if count or number else math.inf
            if future.join_below(own, [until], below) >= below:
                break
            number += 1
        return number

    def observe(self, length: int) -> None:
        """Learn the length of a request that came to its own end."""
        self.history.observe(length)
