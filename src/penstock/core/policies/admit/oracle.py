"""Oracle admission: the forecast peak with true lengths.  For benchmarks only.

Problem: how much is lost by not knowing?
Source: the "theoretical optimum" of the Past-Future paper (arXiv 2507.10150).
Rule: Past-Future's peak with every request's true output length and no reserve.
Limits: needs the future.  Only benchmarks that know it can run this, and no result of
it may be compared as if it were a policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.occupancy import Occupancy
from penstock.core.policies.base import Admit, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended


@dataclass(slots=True)
class Oracle:
    """Admit by the true peak.  A request whose length was not told counts with its cap."""

    _lengths: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    holds = 1

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        columns = view.columns
        lengths = np.fromiter(
            map(self._length, columns.ids, columns.cap.tolist()), np.int64, len(columns)
        )
        steps = np.maximum(0, lengths - columns.generated - 1) + columns.lag + view.overlap
        future = Occupancy(columns.tokens, steps[np.newaxis], view.block_size)
        fixed = view.shared + view.lingering

        def answer(candidate: Candidate) -> Answer:
            request = candidate.request
            length = self._length(request.id, request.cap)
            left = max(0, length - candidate.generated - 1)
            steps = np.array([left + candidate.lag + view.overlap])
            worst = fixed + int(future.with_candidate(candidate.tokens, steps)[0])
            if worst > view.capacity:
                return Defer(f"KV memory: true peak of {worst} blocks exceeds {view.capacity}")
            future.add(candidate.tokens, steps)
            return Admit()

        return answer

    def _length(self, request_id: str, cap: int) -> int:
        return self._lengths.get(request_id, cap)

    def observe(self, ended: Ended) -> None:
        """Forget a request that ended."""
        self._lengths.pop(ended.id, None)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Take in what nobody else may know."""
        self._lengths[request_id] = length
