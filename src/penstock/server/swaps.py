"""Counts the KV that goes to host memory and comes back, from the plans that say so."""

from __future__ import annotations

from penstock.core.engine import KV, Engine, Ticket, Work
from penstock.core.types import Capabilities, RequestId, StepPlan, StepResult
from penstock.server.messages import NOTHING_SWAPPED, Swapped


class SwapCounter:
    """An engine that hands all plans to another one and counts what they swap.

    Args:
        engine: who does the work.

    Attributes:
        held: tokens whose KV is in host memory.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: dict[RequestId, int] = {}
        self._new = NOTHING_SWAPPED
        self.held = 0

    def take(self) -> Swapped:
        """What was swapped since the last call."""
        new, self._new = self._new, NOTHING_SWAPPED
        return new

    @property
    def capabilities(self) -> Capabilities:
        """Those of the engine."""
        return self._engine.capabilities

    def open(self, request_id: RequestId, work: Work) -> None:
        """Hand it on."""
        self._engine.open(request_id, work)

    def discard(self, request_id: RequestId) -> None:
        """Hand it on."""
        self._engine.discard(request_id)
        self._let_go(request_id)

    def take_kv(self, request_id: RequestId, start: int = 0, end: int | None = None) -> KV | None:
        """Hand it on."""
        return self._engine.take_kv(request_id, start, end)

    def submit(self, plan: StepPlan) -> Ticket:
        """Hand it on, and count what it swaps."""
        out, back = self._new
        size = self.capabilities.block_size
        for drop in plan.drops:
            self._let_go(drop.id)
            if drop.swapped:
                self._kept[drop.id] = drop.swapped
                self.held += drop.swapped
                out += drop.swapped
        for start in plan.starts:
            # What another instance computed comes in the same way, and is not counted; what is
            # in cached blocks is not copied.
            back += max(0, self._let_go(start.id) - len(start.cached) * size)
        self._new = Swapped(out, back)
        return self._engine.submit(plan)

    def collect(self, ticket: Ticket) -> StepResult:
        """Hand it on."""
        return self._engine.collect(ticket)

    def close(self) -> None:
        """Hand it on."""
        self._engine.close()

    def _let_go(self, request_id: RequestId) -> int:
        tokens = self._kept.pop(request_id, 0)
        self.held -= tokens
        return tokens
