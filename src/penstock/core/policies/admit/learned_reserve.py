"""Past-Future with a reserve that is learned from evictions.

Problem: how wrong a forecast is depends on the load.  With the paper's fixed reserve of 3 % one
admission in twenty ends in an eviction where answers are long and differ much, hardly any where
they are alike.  An evicted request has a gap of seconds or minutes: under a promise on gaps all of
its work is lost, and the memory that it would have taken to keep it was cheap.

Source: ours.  The update is that of adaptive conformal inference (Gibbs and Candes, NeurIPS 2021,
section 2): a threshold that moves against its own errors keeps their share, whatever the
distribution does.

Rule: as Past-Future, and the reserve moves, within [0, 1/2]: up by a hundredth of the capacity for
each eviction, when the request is admitted again or ends instead; down by ``evictions`` times that
with each admission that took a forecast.  So with ``n`` of these there are at most ``evictions * n
+ 50`` evictions, as long as the reserve stays below its bound.  Where all caps in full fit there is
no forecast and no eviction, and nothing to learn.

Limits: it learns from evictions, so some must happen; a reserve that was learned under a heavy load
is given back over hundreds of admissions; where nobody minds gaps, what it keeps free is wasted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.policies.admit.past_future import PastFuture
from penstock.core.policies.base import Admit, Answer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended, RequestId

STEP = 0.01
"""Share of the capacity by which an eviction moves the reserve."""

MOST = 0.5
"""The largest reserve."""


@dataclass(slots=True)
class LearnedReserve:
    """Admit by the forecast peak, with a margin that evictions move.

    Attributes:
        rng, window, cold_start: see :class:`PastFuture`.
        reserve: what it begins with, in [0, 1/2].
        evictions: how many there may be per admission by forecast, in (0, 1).
        forecast: the policy whose reserve is moved.
    """

    rng: np.random.Generator
    window: int = 1000
    reserve: float = 0.03
    cold_start: int | None = None
    evictions: float = 0.005
    forecast: PastFuture = field(init=False)
    # By request: evictions that the reserve knows of.
    _known: dict[RequestId, int] = field(default_factory=dict, init=False)

    holds = 10  # as Past-Future has it

    def __post_init__(self) -> None:
        if not 0 <= self.reserve <= MOST:
            msg = f"reserve is {self.reserve}; it must be in [0, {MOST}]"
            raise ValueError(msg)
        if not 0 < self.evictions < 1:
            msg = f"evictions is {self.evictions}; it must be above 0 and below 1"
            raise ValueError(msg)
        self.forecast = PastFuture(self.rng, self.window, self.reserve, self.cold_start)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass, with the reserve of this moment."""
        forecast = self.forecast
        inner = forecast.judge(view)

        def answer(candidate: Candidate) -> Answer:
            before = forecast.forecasts
            said = inner(candidate)
            if isinstance(said, Admit):
                name, count = candidate.request.id, candidate.evictions
                if count:
                    self._move(count - self._known.get(name, 0))
                    self._known[name] = count
                if forecast.forecasts > before:
                    self._move(-self.evictions)
            return said

        return answer

    def observe(self, ended: Ended) -> None:
        """Learn the length of a request that came to its own end, and who ended evicted."""
        if ended.evictions:
            self._move(ended.evictions - self._known.pop(ended.id, 0))
        self.forecast.observe(ended)

    def _move(self, steps: float) -> None:
        moved = self.forecast.reserve + STEP * steps
        self.forecast.reserve = min(MOST, max(0.0, moved))

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
