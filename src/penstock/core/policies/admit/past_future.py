"""Past-Future admission: by the forecast peak of KV memory.

Problem: the aggressive rule overflows (evictions, large gaps), the conservative one
wastes memory (queueing).

Source: Past-Future (arXiv 2507.10150), sections 3.2 and 3.3 and Algorithm 1; what the
paper leaves open follows the authors' artifact (its simulator unless stated).

Rule, once per pass: draw an output length for every running request, given what it has
generated, in ``min(5, 200 // n + 1)`` joint scenarios (n running; one if none runs).
For the head of the queue draw a length from the past; admit it if in every scenario the
peak occupancy stays strictly below ``(1 - reserve) * capacity``, and go on with the next;
the first refusal ends the pass.  While even all caps in full stay below that limit, nothing
needs to be drawn: no forecast exceeds them.  A refusal holds for 10 decode steps unless memory is
given back before: to draw anew in every step would admit by luck sooner or later.

Limits: a forecast is no reservation, so evictions stay possible; it relies on lengths
that change slowly; it knows nothing of deadlines.  Blocks of a prefix that a candidate shares with
one request count as that request's, and so as free once it has ended, until the next pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.lengths import LengthHistory
from penstock.core.forecast.occupancy import Occupancy
from penstock.core.forecast.uniform import Uniform
from penstock.core.policies.base import ADMIT, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
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
        holds: decode steps for which a refusal holds; LightLLM's ``max_wait_tokens``.
        forecasts: answers so far that took a forecast.
    """

    rng: np.random.Generator
    window: int = 1000
    reserve: float = 0.03
    cold_start: int | None = None
    holds: int = 10
    history: LengthHistory = field(init=False)
    forecasts: int = field(default=0, init=False)
    _uniform: Uniform = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.reserve < 1:
            msg = f"reserve is {self.reserve}; it must be in [0, 1)"
            raise ValueError(msg)
        self.history = LengthHistory(self.window, self.cold_start)
        self._uniform = Uniform(self.rng)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass; lengths are drawn once they can matter."""
        limit = (1 - self.reserve) * view.capacity
        fixed = view.shared + view.lingering
        room = limit - fixed
        binding, overlap = view.caps_bind, view.overlap
        # What all would hold with their caps in full.
        most = view.reserved + fixed if binding else math.inf
        scenarios = scenario_count(view.running)
        admitted: list[Candidate] = []
        future: Occupancy | None = None

        def steps_of(candidate: Candidate) -> list[int]:
            """After the current one, per scenario; unconditional, also after an eviction."""
            uniform = self._uniform.few(scenarios)
            left = self.history.draw_new(
                uniform, candidate.request.cap, candidate.generated + 1, binding=binding
            )
            more = candidate.lag + overlap
            return [steps + more for steps in left] if more else left

        def answer(candidate: Candidate) -> Answer:
            nonlocal future, most
            most += candidate.most_blocks
            if most < limit:
                admitted.append(candidate)
                return ADMIT
            self.forecasts += 1
            if future is None:
                future = self._occupancy(view, scenarios)
                for earlier in admitted:
                    future.join_below(earlier.tokens, steps_of(earlier), math.inf)
            worst = future.join_below(candidate.tokens, steps_of(candidate), room)
            if worst < room:
                return ADMIT
            return Defer(
                f"KV memory: the forecast peak, {fixed + worst} blocks or more, is not below "
                f"{limit:.0f} ({1 - self.reserve:.0%} of {view.capacity})"
            )

        return answer

    def _occupancy(self, view: Snapshot, scenarios: int) -> Occupancy:
        """The joint scenarios of one pass."""
        columns = view.columns
        count = len(columns)
        uniform = self._uniform.take(scenarios * count).reshape(scenarios, count)
        generated = columns.generated
        lengths = self.history.draw_running(uniform, generated, columns.cap, binding=view.caps_bind)
        steps = np.maximum(0, lengths - (generated + 1))
        if view.running != view.decoding or view.overlap:
            steps += columns.lag + view.overlap
        return Occupancy(columns.tokens, steps, view.block_size)

    def observe(self, ended: Ended) -> None:
        """Learn the length of a request that came to its own end."""
        if ended.reason in {FinishReason.STOP, FinishReason.LENGTH}:
            self.history.observe(ended.output_tokens)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
