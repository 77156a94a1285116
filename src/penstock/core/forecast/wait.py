"""How long would a request wait?  From how fast the queue has been moving.

Problem: a refused client needs an honest time to come back.
Source: our own; Little's law over the recent past.
Rule: while requests wait, remember when the last ``window`` of them were admitted.  With
``k`` ahead, the wait is ``k`` divided by that rate, measured up to now, so that a queue which
has stopped moving is seen to have stopped.
Limits: assumes that those ahead resemble those admitted lately; unknown (None) until two
have been admitted from a queue.
"""

from __future__ import annotations

from collections import deque

_LEAST = 2


class WaitForecast:
    """Rate of admissions out of a queue.

    Args:
        window: admissions remembered.
    """

    def __init__(self, window: int = 64) -> None:
        self._admitted: deque[float] = deque(maxlen=window)

    def admitted(self, now: float) -> None:
        """A request that had to wait was admitted."""
        self._admitted.append(now)

    def rate(self, now: float) -> float | None:
        """Admissions per second out of the queue, or None while unknown."""
        if len(self._admitted) < _LEAST:
            return None
        span = now - self._admitted[0]
        return len(self._admitted) / span if span > 0 else None
