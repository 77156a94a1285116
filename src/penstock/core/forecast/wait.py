"""How long would a request wait?  From how fast the queue has been moving.

Problem: a refused client needs an honest time to come back.
Source: our own; Little's law over the recent past.
Rule: remember when the last ``window`` requests that had to wait were admitted, on a clock
that stands still while nobody waits.  With ``k`` ahead, the wait is ``k`` divided by that rate,
measured up to now, so that a queue which has stopped moving is seen to have stopped, and an
empty one is not taken for such a queue.
Limits: assumes that those ahead resemble those admitted lately; unknown (None) until two
have been admitted from a queue.
"""

from __future__ import annotations

from collections import deque
from itertools import repeat

_LEAST = 2


class WaitForecast:
    """Rate of admissions out of a queue.

    Args:
        window: admissions remembered.
    """

    def __init__(self, window: int = 64) -> None:
        self._admitted: deque[float] = deque(maxlen=window)
        self._stood_still = 0.0
        self._empty_since: float | None = None

    def emptied(self, now: float) -> None:
        """Nobody waits (any more)."""
        if self._empty_since is None:
            self._empty_since = now

    def waiting(self, since: float) -> None:
        """Somebody waits, and has waited since ``since``."""
        if self._empty_since is not None:
            self._stood_still += max(0.0, since - self._empty_since)
            self._empty_since = None

    def admitted(self, now: float, count: int = 1) -> None:
        """So many requests that had to wait were admitted."""
        self._admitted.extend(repeat(now - self._stood_still, count))

    def rate(self, now: float) -> float | None:
        """Admissions per second out of the queue, or None while unknown."""
        if len(self._admitted) < _LEAST:
            return None
        until = now if self._empty_since is None else self._empty_since
        span = until - self._stood_still - self._admitted[0]
        return len(self._admitted) / span if span > 0 else None
