"""Static batches in the order in which they were made, whole.

Problem: the members of a static batch came at different times, some of them long ago; by their
arrivals, batches would be torn apart.
Source: the instances' queues of batches in SCLS (arXiv 2406.13511).
Rule: by batch number, then by arrival.  Requests that belong to no batch come first, by arrival.
Limits: as for first come, first served.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.policies.base import OrderKey
from penstock.core.types import Request


@dataclass(frozen=True, slots=True)
class InBatches:
    """By batch, then by arrival."""

    def key(self, request: Request) -> OrderKey:
        """Batch number and arrival."""
        return (request.batch, request.arrival)
