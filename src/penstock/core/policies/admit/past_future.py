"""Past-Future admission: by the forecast peak of KV memory.

Problem: the aggressive rule overflows (evictions, large gaps), the conservative one
wastes memory (queueing).

Source: Past-Future (arXiv 2507.10150), sections 3.2 and 3.3 and Algorithm 1; what the
paper leaves open follows the authors' artifact (its simulator unless stated).

Rule, once per pass: draw an output length for every running request, given what it has
generated, in ``min(5, 200 // n + 1)`` joint scenarios (n running; one if none runs).
For the head of the queue draw a length from the past; admit it if in every scenario the
peak occupancy stays strictly below ``(1 - reserve) * capacity``, and go on with the next;
the first refusal ends the pass.  It holds for 10 decode steps unless memory is given back
before: to draw anew in every step would admit by luck sooner or later.

Limits: a forecast is no reservation, so evictions stay possible; it relies on lengths
that change slowly; it knows nothing of deadlines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.lengths import LengthHistory
from penstock.core.forecast.occupancy import Occupancy
from penstock.core.policies.base import Admit, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Ints, Snapshot
from penstock.core.types import Ended, FinishReason

_MAX_SCENARIOS = 5  # MAXIMUM_LISTS in the artifact
_MIN_SAMPLES = 200  # MINIMUM_SAMPLES in the artifact


def scenario_count(running: int) -> int:
    """Joint scenarios drawn for so many running requests."""
    return 1 if running == 0 else min(_MAX_SCENARIOS, _MIN_SAMPLES // running + 1)


@dataclass(slots=True)
class PastFuture:
    """Admit by the forecast peak.

    Attributes:
        rng: source of the draws; the only randomness in the policy.
        window: past output lengths kept.
        reserve: share of the capacity kept free against forecast errors, in [0, 1).
        cold_start: output length assumed before anything has ended; None is each request's cap.
    """

    rng: np.random.Generator
    window: int = 1000
    reserve: float = 0.03
    cold_start: int | None = None
    history: LengthHistory = field(init=False)

    holds = 10  # LightLLM's max_wait_tokens

    def __post_init__(self) -> None:
        if not 0 <= self.reserve < 1:
            msg = f"reserve is {self.reserve}; it must be in [0, 1)"
            raise ValueError(msg)
        self.history = LengthHistory(self.window, self.cold_start)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass: draw the running requests' lengths."""
        columns = view.columns
        scenarios = scenario_count(len(columns))
        uniform = self.rng.random((scenarios, len(columns)))
        lengths = self.history.draw_running(uniform, columns.generated, columns.cap)
        steps = np.maximum(0, lengths - columns.generated - 1) + columns.lag + view.overlap
        future = Occupancy(columns.tokens, steps, view.block_size)
        fixed = view.shared + view.lingering
        limit = (1 - self.reserve) * view.capacity

        def answer(candidate: Candidate) -> Answer:
            drawn = self._draw(candidate, scenarios) + view.overlap
            worst = fixed + int(future.with_candidate(candidate.tokens, drawn).max())
            if worst >= limit:
                return Defer(
                    f"KV memory: forecast peak of {worst} blocks is not below "
                    f"{limit:.0f} ({1 - self.reserve:.0%} of {view.capacity})"
                )
            future.add(candidate.tokens, drawn)
            return Admit()

        return answer

    def _draw(self, candidate: Candidate, scenarios: int) -> Ints:
        """Steps after the current one, per scenario; unconditional, also after an eviction."""
        generated = candidate.generated
        lengths = self.history.draw_new(self.rng.random(scenarios), candidate.request.cap)
        steps: Ints = np.maximum(0, lengths - generated - 1) + candidate.lag
        return steps

    def observe(self, ended: Ended) -> None:
        """Learn the length of a request that came to its own end."""
        if ended.reason in {FinishReason.STOP, FinishReason.LENGTH}:
            self.history.observe(ended.output_tokens)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
