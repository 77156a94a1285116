"""The states of a request and the only legal moves between them."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Where a request stands."""

    WAITING = "waiting"  # never had KV memory
    PREFILL = "prefill"  # has memory; tokens it already has are still being computed
    DECODE = "decode"  # has memory; one new token per step
    EVICTED = "evicted"  # lost its memory; waits to recompute
    DRAINING = "draining"  # its last token is planned but not confirmed
    ENDED = "ended"

    # Enum's is in Python, and every move asks it twice.
    __hash__ = str.__hash__


MOVES = MappingProxyType(
    {
        State.WAITING: frozenset({State.PREFILL, State.ENDED}),
        State.PREFILL: frozenset({State.DECODE, State.EVICTED, State.DRAINING, State.ENDED}),
        State.DECODE: frozenset({State.EVICTED, State.DRAINING, State.ENDED}),
        State.EVICTED: frozenset({State.PREFILL, State.ENDED}),
        State.DRAINING: frozenset({State.ENDED}),
        State.ENDED: frozenset[State](),
    }
)
"""Every legal move; anything else is a bug in the scheduler."""


class IllegalMoveError(RuntimeError):
    """The scheduler tried a move that :data:`MOVES` does not know."""

    def __init__(self, request_id: str, old: State, new: State) -> None:
        super().__init__(f"request {request_id}: illegal move {old} -> {new}")
