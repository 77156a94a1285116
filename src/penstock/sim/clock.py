"""Time that passes only when the simulated engine says so."""

from __future__ import annotations


class VirtualClock:
    """Callable like ``time.monotonic``; seconds from 0."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds since the start."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def advance_to(self, moment: float) -> None:
        """Let time pass until ``moment``, unless it is past already."""
        self.now = max(self.now, moment)
