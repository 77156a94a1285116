"""Tokens that were generated early are kept back and released at the pace of their promise.

Problem: where decode steps are packed by slack, tokens come in bursts: early for a while, then
late.
Source: Kairos (arXiv 2605.02329), which takes it that tokens are buffered so that delivery is
decoupled from generation.
Rule: the n-th token of a request with a TPOT promise is released no earlier than n - 1 paces after
its first one, less a little so that a timer that is late breaks no promise, and never so late that
the promises of a largest gap or of the end are broken; its end not before its last token.  All
latencies are those at release.
Limits: a stop string is found when its text is released, so the engine may compute some tokens more
than are told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from penstock.server.choice import Choice

# Timers come late by some milliseconds where the event loop is busy.
_EARLY, _LATE = 0.02, 0.005

Release: TypeAlias = Callable[[float], None]
"""Does what was kept back; told the time."""


class Pacer:
    """Keeps back what came early.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[Choice, deque[tuple[bool, Release]]] = {}

    def token(self, choice: Choice, now: float, release: Release) -> None:
        """A token came; it is released now or later."""
        self._take(choice, now, release, is_token=True)

    def end(self, choice: Choice, now: float, release: Release) -> None:
        """A request ended; that is told after its last token."""
        self._take(choice, now, release, is_token=False)

    def flush(self, choice: Choice) -> None:
        """Release all that is kept back of a request."""
        kept = self._kept.pop(choice, None)
        for _, release in kept or ():
            release(self._clock())

    def forget(self, choice: Choice) -> None:
        """Nobody reads the rest."""
        self._kept.pop(choice, None)

    def _take(self, choice: Choice, now: float, release: Release, *, is_token: bool) -> None:
        kept = self._kept.get(choice)
        if kept is None:
            due = _due(choice, is_token=is_token)
            if due <= now:
                release(now)
                return
            kept = self._kept[choice] = deque()
            self._wake(choice, due - now)
        kept.append((is_token, release))

    def _wake(self, choice: Choice, delay: float) -> None:
        asyncio.get_running_loop().call_later(delay, self._go_on, choice)

    def _go_on(self, choice: Choice) -> None:
        while (kept := self._kept.get(choice)) is not None:
            now = self._clock()
            if not kept:
                del self._kept[choice]
                return
            due = _due(choice, is_token=kept[0][0])
            if due > now:
                self._wake(choice, due - now)
                return
            kept.popleft()[1](now)


def _due(choice: Choice, *, is_token: bool) -> float:
    """When its next token, or what follows the last one, may be told."""
    slo, times = choice.promise.slo, choice.times
    if slo.tpot is None or not choice.tokens or not is_token:
        return 0.0
    bounds = [times.first + slo.tpot * choice.tokens * (1 - _EARLY)]
    if slo.gap is not None:
        bounds.append(times.last + slo.gap)
    if slo.e2e is not None:
        bounds.append(times.arrival + slo.e2e)
    return min(bounds) - min(_LATE, slo.tpot / 2)
