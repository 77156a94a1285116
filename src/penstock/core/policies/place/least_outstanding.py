"""Least outstanding requests.

Problem: round-robin goes on feeding an instance that has fallen behind.
Source: the "least connections" rule of load balancers; vLLM's data-parallel router.
Rule: the instance with the fewest requests sent and not ended; the first of equals.
Limits: a request of ten tokens counts like one of ten thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.policies.dispatch import InstanceView


@dataclass(frozen=True, slots=True)
class LeastOutstanding:
    """Who has fewest."""

    needs_progress = False
    needs_cost = False

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """The instance with the fewest requests."""
        del tokens
        return min(range(len(instances)), key=lambda index: instances[index].requests)

    def observe(self, length: int) -> None:
        """Nothing to learn."""
