"""First come, first served.

Problem: some order must be the default, and it must not starve anyone.
Source: every serving system; the order of the Past-Future paper.
Rule: by arrival.  An evicted request keeps its arrival and so returns to the front.
Limits: a long prompt blocks the short ones behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import OrderKey
from penstock.core.types import Request


@dataclass(frozen=True, slots=True)
class Fcfs:
    """Order by arrival."""

    def key(self, request: Request) -> OrderKey:
        """Arrival time, in seconds."""
        return (request.arrival,)
