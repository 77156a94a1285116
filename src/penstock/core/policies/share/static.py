"""Prompts first, then all decode: how a static batch runs.

Problem: a rectangle of prompts is one kernel, a rectangle of newest tokens another.
Source: the sequence-level scheduling that SCLS (arXiv 2406.13511) compares with.
Rule: while any prompt is being computed nobody decodes; prompts get the engine's whole step.
Limits: with continuous batching, every newcomer's prompt would stall everyone.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import Split
from penstock.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class StaticShare:
    """One after the other."""

    steady = True

    def split(self, view: Snapshot, max_step_tokens: int) -> Split:
        """Decode if no prompt is left."""
        decode = view.running == view.decoding
        return Split(decode=decode, prefill=max_step_tokens - (view.decoding if decode else 0))
