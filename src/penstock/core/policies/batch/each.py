"""No batches: every request goes to its instance by itself.

Problem: instances that batch continuously need no batches made for them.
Source: the baselines of SCLS (arXiv 2406.13511); any load balancer.
Rule: every request is a batch of one, in the order of the pool.
Limits: an instance with static batches makes them in the order in which requests come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.forecast.slices import SliceCost


@dataclass(frozen=True, slots=True)
class Each:
    """One by one."""

    needs_cost = False
    together = False

    def batches(self, lengths: Sequence[int], cost: SliceCost | None) -> list[list[int]]:
        """A list per request."""
        del cost
        return [[index] for index in range(len(lengths))]
