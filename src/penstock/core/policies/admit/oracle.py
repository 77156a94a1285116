"""Oracle admission: the forecast peak with true lengths.  For benchmarks only.

Problem: how much is lost by not knowing?
Source: the "theoretical optimum" of the Past-Future paper (arXiv 2507.10150).
Rule: Past-Future's peak with every request's true output length and no reserve.
Limits: needs the future.  Only benchmarks that know it can run this, and no result of
it may be compared as if it were a policy.  With a prefix cache its peak is not exact, see
:mod:`penstock.core.policies.admit.past_future`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.occupancy import Occupancy
from penstock.core.policies.base import ADMIT, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended


@dataclass(slots=True)
class Oracle:
    """Admit by the true peak.  A request whose length was not told counts with its cap."""

    _lengths: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    holds = 1

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass; the peak is worked out once it can matter."""
        fixed = view.shared + view.lingering
        # What all would hold with their caps in full.
        most = view.reserved + fixed if view.caps_bind else math.inf
        admitted: list[Candidate] = []
        future: Occupancy | None = None

        def steps_of(candidate: Candidate) -> list[int]:
            request = candidate.request
            left = self._length(request.id, request.cap) - candidate.generated - 1
            return [max(0, left) + candidate.lag + view.overlap]

        def answer(candidate: Candidate) -> Answer:
            nonlocal future, most
            most += candidate.most_blocks
            if most <= view.capacity:
                admitted.append(candidate)
                return ADMIT
            if future is None:
                future = self._occupancy(view)
                for earlier in admitted:
                    future.join_below(earlier.tokens, steps_of(earlier), math.inf)
            # A peak that fills the memory is still good.
            limit = view.capacity - fixed + 1
            worst = future.join_below(candidate.tokens, steps_of(candidate), limit)
            if worst < limit:
                return ADMIT
            return Defer(
                f"KV memory: the true peak, {fixed + worst} blocks or more, exceeds {view.capacity}"
            )

        return answer

    def _occupancy(self, view: Snapshot) -> Occupancy:
        columns = view.columns
        lengths = np.fromiter(
            map(self._length, columns.ids, columns.cap.tolist()), np.int64, len(columns)
        )
        steps = np.maximum(0, lengths - columns.generated - 1) + columns.lag + view.overlap
        return Occupancy(columns.tokens, steps[np.newaxis], view.block_size)

    def _length(self, request_id: str, cap: int) -> int:
        return self._lengths.get(request_id, cap)

    def observe(self, ended: Ended) -> None:
        """Forget a request that ended."""
        self._lengths.pop(ended.id, None)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Take in what nobody else may know."""
        self._lengths[request_id] = length
