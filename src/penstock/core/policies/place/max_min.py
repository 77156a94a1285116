"""Max-min offloading: the dearest batch first, each to the least loaded instance.

Problem: instances whose loads differ end at different times, and the last one counts.
Source: SCLS (arXiv 2406.13511), the max-min offloader.
Rule: an instance's load is the estimated seconds of all batches that it was sent and has not
completed.  Batches are placed by falling estimate, each where the load is least.
Limits: as good as the estimates; what a batch has done so far is not subtracted before its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.policies.dispatch import InstanceView


@dataclass(frozen=True, slots=True)
class MaxMin:
    """Where the estimated load is least."""

    needs_progress = False
    needs_cost = True

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """The instance with the least load."""
        del tokens
        return min(range(len(instances)), key=lambda index: instances[index].load)

    def observe(self, length: int) -> None:
        """Nothing to learn."""
