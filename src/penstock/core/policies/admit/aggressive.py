"""Aggressive admission: a watermark over the memory used now.

Problem: output lengths are unknown, so future memory is unknown.
Source: vLLM's block manager; the "aggressive" baseline of the Past-Future paper
(arXiv 2507.10150), whose future output counts as nothing.
Rule: admit while used + needed now <= watermark * capacity.
Limits: the outputs do grow, so under load memory overflows, and requests are evicted
and recomputed: large inter-token gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import ADMIT, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended


@dataclass(frozen=True, slots=True)
class Aggressive:
    """Admit up to a watermark.

    Attributes:
        watermark: share of the capacity that admission may fill, in (0, 1].
    """

    watermark: float = 0.99

    holds = None

    def __post_init__(self) -> None:
        if not 0 < self.watermark <= 1:
            msg = f"watermark is {self.watermark}; it must be in (0, 1]"
            raise ValueError(msg)

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        used = view.used
        limit = self.watermark * view.capacity

        def answer(candidate: Candidate) -> Answer:
            nonlocal used
            if used + candidate.blocks > limit:
                return Defer(
                    f"KV memory: {used} blocks used and {candidate.blocks} needed "
                    f"are more than the watermark's {limit:.0f}"
                )
            used += candidate.blocks
            return ADMIT

        return answer

    def observe(self, ended: Ended) -> None:
        """Nothing to learn."""

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""
