"""When a backend is left alone: a rest after each failure, a circuit that opens after several.

Closed: it gets slices, except while it rests.  Open: it gets nothing, and what it had goes
elsewhere.  Half open: it is being probed.  The back-off doubles with each failure and begins anew
with the first slice that ends well, so a backend that passes probes and fails slices is tried less
and less often.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

_LEAST_REST = 0.1  # a backend that wants none would be asked again in a loop


class State(StrEnum):
    """Of a circuit."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class Circuit:
    """One backend's.

    Args:
        threshold: failures in a row that open it, at least 1.
        backoff: seconds until the first probe after it has opened.
        max_backoff: most seconds between two probes.
        clock: seconds, never falling.

    Attributes:
        failures: in a row.
        due: when an open circuit may be probed.
        rest_until: until when a closed one gets nothing, after a failure.
        busy_until: the same, because it asked for it.
    """

    def __init__(
        self, threshold: int, backoff: float, max_backoff: float, clock: Callable[[], float]
    ) -> None:
        self._threshold = threshold
        self._first, self._most = backoff, max_backoff
        self._clock = clock
        self._backoff = backoff
        self.state = State.CLOSED
        self.failures = 0
        self.due = 0.0
        self.rest_until = 0.0
        self.busy_until = 0.0

    @property
    def available(self) -> bool:
        """Whether it may get a slice now."""
        return self.state is State.CLOSED and self._clock() >= self.free_at

    @property
    def free_at(self) -> float:
        """When a closed one may get a slice."""
        return max(self.rest_until, self.busy_until)

    def busy(self, seconds: float) -> None:
        """It asked to be left alone for so long, 0.1 s to ``max_backoff``; no failure."""
        seconds = min(max(seconds, _LEAST_REST), self._most)
        self.busy_until = max(self.busy_until, self._clock() + seconds)

    def success(self) -> None:
        """A slice ended well."""
        self.failures = 0
        if self.state is State.CLOSED:
            self._backoff = self._first

    def failure(self) -> bool:
        """A slice failed; True if that has opened the circuit."""
        self.failures += 1
        if self.state is not State.CLOSED:
            return False
        if self.failures < self._threshold:
            self.rest_until = self._clock() + self._backoff * self.failures / self._threshold
            return False
        self._open()
        return True

    def probe(self) -> None:
        """A probe begins."""
        self.state = State.HALF_OPEN

    def probed(self, *, ok: bool) -> None:
        """The probe's outcome."""
        if ok:
            self.state = State.CLOSED
            self.failures = 0
            self.rest_until = self.busy_until = 0.0
        else:
            self._open()

    def _open(self) -> None:
        self.state = State.OPEN
        self.due = self._clock() + self._backoff
        self._backoff = min(2 * self._backoff, self._most)
