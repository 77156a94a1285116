"""Conservative admission: reserve every request's cap.

Problem: output lengths are unknown, so future memory is unknown.
Source: text-generation-inference (TGI), DeepSpeed-MII and TensorRT-LLM; the
"conservative" baseline of the Past-Future paper (arXiv 2507.10150).
Rule: admit while the sum of (prompt + cap) over all running requests
<= over_commit * capacity.
Limits: real outputs are much shorter than their caps, so memory lies idle and requests
queue.  With ``over_commit`` above 1 it can overflow like the aggressive one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.core.policies.base import ADMIT, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended


@dataclass(frozen=True, slots=True)
class Conservative:
    """Reserve prompt + cap.

    Attributes:
        over_commit: reservations may add up to this many times the capacity, above 0.
    """

    over_commit: float = 1.0

    holds = None

    def __post_init__(self) -> None:
        if not self.over_commit > 0:
            msg = f"over_commit is {self.over_commit}; it must be above 0"
            raise ValueError(msg)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        size = view.block_size
        reserved = view.reserved + view.lingering
        if view.shared:
            columns = view.columns
            tokens = columns.prompt + columns.cap - columns.shared
            reserved = int(np.sum(-(-tokens // size))) + view.shared + view.lingering
        limit = self.over_commit * view.capacity

        def answer(candidate: Candidate) -> Answer:
            nonlocal reserved
            request = candidate.request
            need = -(-(request.prompt_tokens + request.cap - candidate.shared) // size)
            if reserved + need > limit:
                return Defer(
                    f"KV memory: {reserved} blocks reserved and {need} to reserve "
                    f"are more than {limit:.0f}"
                )
            reserved += need
            return ADMIT

        return answer

    def observe(self, ended: Ended) -> None:
        """Nothing to learn."""

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
