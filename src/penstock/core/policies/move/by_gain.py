"""Move a request where it would end sooner, if that pays for computing its KV again.

Problem: whoever was placed well when it came may be placed badly when its neighbours turn out
long; and a request in slices could go elsewhere at each of them.
Source: our own; SCLS (arXiv 2406.13511) moves every request after every slice, at the price of its
prompt and output computed anew.
Rule: a request may move when it has had a slice of ``slice_tokens`` where it is, or nothing yet.
It has as many tokens to come as the mean of past lengths beyond what it has.  On an instance with
``n`` requests and ``c`` tokens of context a step takes ``d1 c + d2 n + d3 c / n + d4``; the gain is
the tokens to come times the difference between the two steps, with it moved, less the prefill
of what it has; that one is due anyway if it has no token yet.  The best gain above ``least`` goes
first; an instance gives or takes one at a time.
Limits: waiting requests count as if they ran, which makes a crowded instance look slow, as it is;
the newcomer's prefill also delays those it joins, which is not counted; SLOs are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.lengths import LengthHistory


class Stay(NamedTuple):
    """A request at an instance.

    Attributes:
        slice_id: names its stay.
        prompt, generated, cap: tokens.
        fresh: output tokens that it has had there.
    """

    slice_id: str
    prompt: int
    generated: int
    cap: int
    fresh: int


class Move(NamedTuple):
    """A request to move, by its stay, and the instances' indices."""

    slice_id: str
    source: int
    target: int


@dataclass(slots=True)
class ByGain:
    """Move what gains.

    Attributes:
        history: past output lengths.
        slice_tokens: output tokens between two moves of a request.
        least: seconds that a move must gain.
        every: seconds between two looks.
    """

    history: LengthHistory
    slice_tokens: int
    least: float = 1.0
    every: float = 1.0

    def moves(self, instances: Sequence[Sequence[Stay]], model: Bilinear) -> list[Move]:
        """At most one from and to each instance."""
        if len(instances) < 2:
            return []
        past = self.history.sorted_lengths()
        sums = np.concatenate(([0], np.cumsum(past[::-1])))[::-1]
        found: list[tuple[float, Move]] = []
        loads = [_Load.of(stays) for stays in instances]
        # Who moves from the slowest gains most; any other pair can wait for the next look.
        steps = [load.step(model) for load in loads]
        order = sorted(range(len(steps)), key=steps.__getitem__)
        chosen: list[Move] = []
        for target, source in zip(order, reversed(order), strict=True):
            if steps[source] <= steps[target]:
                break
            found = [
                (gain, Move(stay.slice_id, source, target))
                for stay in instances[source]
                if stay.fresh >= self.slice_tokens or not stay.generated
                if (gain := self._gain(stay, loads[target], steps[source], model, past, sums))
                > self.least
            ]
            if found:
                chosen.append(max(found)[1])
        return chosen

    def _gain(
        self,
        stay: Stay,
        target: _Load,
        step_here: float,
        model: Bilinear,
        past: np.ndarray[tuple[int], np.dtype[np.int64]],
        sums: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> float:
        first = int(past.searchsorted(stay.generated, side="right"))
        longer = len(past) - first
        length = stay.cap if not longer else min(stay.cap, int(sums[first]) / longer)
        context = stay.prompt + stay.generated
        there = target.with_one(context).step(model)
        p1, p2, p3, p4 = model.prefill
        again = (p1 + p3) * context + p2 + p4 if stay.generated else 0.0
        return (length - stay.generated) * (step_here - there) - again


class _Load(NamedTuple):
    """Requests at an instance, and their tokens."""

    requests: int
    context: int

    @classmethod
    def of(cls, stays: Sequence[Stay]) -> _Load:
        return cls(len(stays), sum(stay.prompt + stay.generated for stay in stays))

    def with_one(self, context: int) -> _Load:
        return _Load(self.requests + 1, self.context + context)

    def step(self, model: Bilinear) -> float:
        """Seconds of a decode step of all of them; 0 without any."""
        if not self.requests:
            return 0.0
        d1, d2, d3, d4 = model.decode
        mean = self.context / self.requests
        return d1 * self.context + d2 * self.requests + d3 * mean + d4
