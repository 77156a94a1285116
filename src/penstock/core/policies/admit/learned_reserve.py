"""Past-Future with a reserve that is learned from evictions.

Problem: how wrong a forecast is depends on the load.  With the paper's fixed reserve of 3 % one
admission in twenty ends in an eviction where answers are long and differ much, hardly any where
they are alike.  An evicted request has a gap of seconds or minutes: under a promise on gaps all of
its work is lost, and the memory that it would have taken to keep it was cheap.

Source: ours.  The update is that of adaptive conformal inference (Gibbs and Candes, NeurIPS 2021,
section 2): a threshold that moves against its own errors keeps their share, whatever the
distribution does.

Rule: as Past-Future, and with each admission the reserve moves: up by a hundredth of the capacity
if the request had been evicted, and in any case down by ``evictions`` times that, within [0, 1/2].
So of ``n`` admissions at most ``evictions * n + 50`` follow an eviction, as long as the reserve
stays below its bound.

Limits: it learns from evictions, so some must happen; a reserve that was learned under a heavy load
is given back over hundreds of admissions; where nobody minds gaps, what it keeps free is wasted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.policies.admit.past_future import PastFuture
from penstock.core.policies.base import Admit, Answer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended

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
        evictions: share of the admissions that may follow an eviction, in (0, 1).
        forecast: the policy whose reserve is moved.
    """

    rng: np.random.Generator
    window: int = 1000
    reserve: float = 0.03
    cold_start: int | None = None
    evictions: float = 0.005
    forecast: PastFuture = field(init=False)

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
        down = STEP * self.evictions

        def answer(candidate: Candidate) -> Answer:
            said = inner(candidate)
            if isinstance(said, Admit):
                up = STEP if candidate.evictions else 0.0
                forecast.reserve = min(MOST, max(0.0, forecast.reserve + up - down))
            return said

        return answer

    def observe(self, ended: Ended) -> None:
        """Learn the length of a request that came to its own end."""
        self.forecast.observe(ended)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
