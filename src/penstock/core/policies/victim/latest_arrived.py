"""The latest arrived gives its memory back.

Problem: decoding needs one more block than there is.
Source: vLLM's preemption and LightLLM's pause strategy (newest request first);
Past-Future artifact, ``pause_strategy``.
Rule: the running request that arrived last loses all its KV and recomputes later.
Limits: blind to the work lost; a long prompt that came last is expensive to recompute.
The earliest arrived is never a victim while others run, so it always ends:
with a finite load nobody starves.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.snapshot import Columns


@dataclass(frozen=True, slots=True)
class LatestArrived:
    """Evict the largest arrival number."""

    def choose(self, running: Columns) -> int:
        """Row of the latest arrived."""
        return int(running.seq.argmax())
