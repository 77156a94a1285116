"""Priority classes, first come first served inside each.

Problem: some requests matter more than others.
Source: vLLM's ``priority`` policy (smaller numbers first).
Rule: by (priority, arrival).
Limits: under lasting overload of the upper classes the lower ones wait for as
long as it lasts; under any finite load everyone is served.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import OrderKey
from penstock.core.types import Request


@dataclass(frozen=True, slots=True)
class Priority:
    """Order by priority, then arrival."""

    def key(self, request: Request) -> OrderKey:
        """(priority, arrival)."""
        return (request.priority, request.arrival)
