"""Continuous batching with chunked prefill under a token budget.

Problem: a whole long prompt in one step stalls every decoding request.
Source: Orca (iteration-level scheduling), Sarathi-Serve (chunked prefill, stall-free
batching), vLLM V1.
Rule: every decoding request advances in every step; prompts get what is left of the
budget, cut into chunks, in the order of admission.
Limits: the budget is a constant, so it fits one ratio of TTFT to TPOT only.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import Split
from penstock.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Continuous:
    """Decode first, chunks with the rest.

    Attributes:
        token_budget: most tokens in a step; 0 takes the engine's limit.
    """

    token_budget: int = 0

    steady = True

    def __post_init__(self) -> None:
        if self.token_budget < 0:
            msg = f"token_budget is {self.token_budget}; it must be 0 (the engine's limit) or more"
            raise ValueError(msg)

    def split(self, view: Snapshot, max_step_tokens: int) -> Split:
        """All decode, and the rest of the budget for prefill."""
        budget = min(self.token_budget or max_step_tokens, max_step_tokens)
        return Split(decode=True, prefill=max(0, budget - view.decoding))
