"""Continuous batching with a cap on how many run.

Problem: output lengths are unknown, so future memory is unknown.
Source: iteration-level scheduling (ILS) as SCLS (arXiv 2406.13511) compares with it: engines
that limit the number of parallel requests to avoid running out of memory.
Rule: admit while fewer than ``parallel`` run and the memory that it needs now is free.
Limits: a cap that is safe for long answers wastes memory on short ones, and one that is not
leads to evictions.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import ADMIT, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended


@dataclass(frozen=True, slots=True)
class Capped:
    """So many at a time.

    Attributes:
        parallel: most requests that run together, at least 1.
    """

    parallel: int = 16

    holds = None

    def __post_init__(self) -> None:
        if self.parallel < 1:
            msg = f"parallel is {self.parallel}; it must be at least 1"
            raise ValueError(msg)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        running = view.running
        used = view.used

        def answer(candidate: Candidate) -> Answer:
            nonlocal running, used
            if running >= self.parallel:
                return Defer(f"{running} requests run; at most {self.parallel} may")
            if used + candidate.blocks > view.capacity:
                return Defer(
                    f"KV memory: {used} blocks used and {candidate.blocks} needed "
                    f"are more than {view.capacity}"
                )
            running += 1
            used += candidate.blocks
            return ADMIT

        return answer

    def observe(self, ended: Ended) -> None:
        """Nothing to learn."""

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
