"""Static batches: nobody enters while a batch runs.

Problem: engines that pad a batch to one rectangle cannot let anyone in before all are done.
Source: the sequence-level scheduling (SLS) that SCLS (arXiv 2406.13511) compares with, and the
batches of SCLS itself; Hugging Face's ``generate``.
Rule: when nothing runs, admit the heads of the queue: up to ``batch_size`` of those that belong to
no batch, or all that belong to the first one's.  None enters if prompts and caps in full, which
for a slice is its end, would exceed the memory: they cannot be evicted from a rectangle.
Limits: a short answer waits for the longest; a small batch wastes the accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.policies.base import ADMIT, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended


@dataclass(slots=True)
class Static:
    """A batch at a time.

    Attributes:
        batch_size: most requests of a batch that is made here; 0 is no limit.
    """

    batch_size: int = 16
    _batch: int = field(default=0, init=False)
    _left: int = field(default=0, init=False)

    holds = None

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            msg = f"batch_size is {self.batch_size}; it must be 0 (no limit) or more"
            raise ValueError(msg)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass: a new batch if nothing runs, the rest of the last one if it is filling."""
        reserved = view.reserved + view.lingering
        fresh = view.running == 0
        filling = view.running > view.decoding

        def answer(candidate: Candidate) -> Answer:
            nonlocal reserved, fresh
            request = candidate.request
            if fresh:
                fresh = False
                self._batch, self._left = request.batch, self.batch_size or view.waiting
            elif not (view.running == 0 or filling):
                return Defer(f"a static batch of {view.running} requests runs")
            if request.batch != self._batch or (not request.batch and not self._left):
                return Defer("the static batch is full")
            if reserved + candidate.most_blocks > view.capacity:
                return Defer(
                    f"KV memory: {reserved} blocks reserved for the static batch and "
                    f"{candidate.most_blocks} to reserve are more than {view.capacity}"
                )
            reserved += candidate.most_blocks
            self._left -= 1
            return ADMIT

        return answer

    def observe(self, ended: Ended) -> None:
        """Nothing to learn."""

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
