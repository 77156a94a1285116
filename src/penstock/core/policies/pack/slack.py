"""Decode batches by slack that protect everyone who can still keep the pace.

Problem: a decode step takes longer with long contexts in it; short ones could go faster while the
long ones have time.  Kairos's rule for it stops as soon as one request is late
(:mod:`penstock.core.policies.pack.slack_literal`).
Source: Kairos (arXiv 2605.02329), Algorithm 3, for the idea; the repairs are our own.
Rule: a request's next token is due at the promised pace, counted from its first token, with a
margin, and never later than its gap allows.  A request that is behind further than the rest of its
output, forecast from past lengths, lets it catch up is lost: its token is due ``stretch`` paces
after its latest one.  By ascending context, take the first k requests whose step has the most
tokens per second, provided that whoever sits out can still be in time in a step of all that
follows; all is always possible.
Limits: a step's prompts are not known when it is packed, so the margin must bear them; until step
times are known, all decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.decode import DecodeSteps
from penstock.core.forecast.lengths import LengthHistory
from penstock.core.snapshot import Decoding, Floats, Ints

Mask: TypeAlias = NDArray[np.bool_]


@dataclass(slots=True)
class Slack:
    """The fastest step that makes nobody late.

    Attributes:
        tpot: seconds per token for requests that were promised nothing.
        margin: share of the pace that is held back, in [0, 1).
        stretch: paces between tokens of a lost request, at least 1.
        window: past output lengths kept.
    """

    tpot: float = 0.05
    margin: float = 0.05
    stretch: float = 4.0
    window: int = 1000
    steps: DecodeSteps = field(default_factory=DecodeSteps)
    history: LengthHistory = field(init=False)
    _pace: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        bounds = (
            ("tpot", 0 < self.tpot < float("inf"), "a positive number of seconds"),
            ("margin", 0 <= self.margin < 1, "in [0, 1)"),
            ("stretch", 1 <= self.stretch < float("inf"), "1 or more"),
        )
        for name, good, what in bounds:
            if not good:
                msg = f"{name} is {getattr(self, name)}; it must be {what}"
                raise ValueError(msg)
        self.history = LengthHistory(self.window)

    def choose(self, decoding: Decoding, now: float) -> Ints | None:
        """The first k, the kept before the others, each by context; None for all."""
        if not self.steps.known:
            return None
        promised = np.where(np.isfinite(decoding.tpot), decoding.tpot, self.tpot)
        count = len(promised)
        full = self.steps.seconds(decoding.context)
        kept = self._kept(decoding, promised, now, full)
        order = np.lexsort((decoding.context, ~kept))
        seconds = self.steps.prefixes(decoding.context[order])
        number = int(kept.sum())
        again = np.where(kept, seconds[number - 1] if number else 0.0, full)
        due = (self._due(decoding, promised, kept) - again)[order]
        # Of those who sit out if the first k run, who must be begun with first.
        first_due = np.full(count, np.inf)
        first_due[:-1] = np.minimum.accumulate(due[:0:-1])[::-1]
        allowed = now + seconds <= first_due
        allowed[-1] = True
        speed = np.where(allowed, np.arange(1, count + 1) / seconds, -1.0)
        best = int(speed.argmax()) + 1
        return None if best == count else order[:best]

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn what steps take."""
        self.steps.observe(load, seconds)

    def ended(self, length: int) -> None:
        """Learn an output length."""
        self.history.observe(length)

    def _kept(self, decoding: Decoding, promised: Floats, now: float, full: float) -> Mask:
        """Those who shall keep their pace, as many as steps leave room for."""
        pace = promised * (1 - self.margin)
        behind = now - (decoding.first + promised * decoding.generated)
        nobody = np.zeros_like(decoding.generated)
        typical = self.history.draw_running(
            np.full(len(promised), 0.5), decoding.generated, nobody, binding=False
        )
        left = np.maximum(typical - decoding.generated, 0)
        lost = behind > np.maximum(left * (pace - self._pace), 0)
        order = np.lexsort((decoding.context, lost))
        seconds = self.steps.prefixes(decoding.context[order])
        # The others take part in one step of all per ``stretch`` paces.
        shared = (full + (self.stretch - 1) * seconds) / self.stretch
        shared[-1] = full
        fits = shared <= np.minimum.accumulate(pace[order])
        number = int(np.flatnonzero(fits)[-1]) + 1 if fits.any() else 0
        self._pace = float(shared[number - 1]) if number else full
        kept: Mask = np.zeros(len(promised), dtype=bool)
        kept[order[:number]] = True
        kept &= ~lost
        return kept

    def _due(self, decoding: Decoding, promised: Floats, kept: Mask) -> Floats:
        """When each next token is due."""
        steady = decoding.first + promised * (1 - self.margin) * decoding.generated
        slow = decoding.latest + self.stretch * promised
        earliest: Floats = np.minimum(np.where(kept, steady, slow), decoding.latest + decoding.gap)
        return earliest
