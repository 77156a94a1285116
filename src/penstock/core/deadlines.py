"""Deadlines that wait in a heap until they are due, so that nobody polls them."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from enum import StrEnum

from penstock.core.entry import Entry
from penstock.core.lifecycle import State
from penstock.core.types import OnMiss

_FEW = 64


class Promise(StrEnum):
    """The promise that a deadline belongs to."""

    TTFT = "ttft"
    GAP = "gap"
    E2E = "e2e"


@dataclass(frozen=True, slots=True)
class Miss:
    """A promise that can no longer be kept."""

    entry: Entry
    promise: Promise
    detail: str


class Deadlines:
    """Deadlines of requests whose ``on_miss`` asks for action.

    TTFT and end-to-end deadlines are set when a request arrives.  The gap is watched while a
    request is evicted; between two steps in which it takes part the gap is the step time,
    which no decision about this request could have shortened.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Promise, int, Entry]] = []
        self._most = _FEW

    def arrived(self, entry: Entry) -> None:
        """Set the deadlines that count from the arrival."""
        request = entry.request
        if request.on_miss is OnMiss.KEEP:
            return
        if request.slo.ttft is not None and not request.generated:
            self._push(request.arrival + request.slo.ttft, Promise.TTFT, entry)
        if request.slo.e2e is not None:
            self._push(request.arrival + request.slo.e2e, Promise.E2E, entry)

    def evicted(self, entry: Entry) -> None:
        """Set the deadline for the next token of a request that has just been evicted."""
        request = entry.request
        if request.on_miss is OnMiss.KEEP or request.slo.gap is None or entry.generated == 0:
            return
        self._push(entry.latest_at + request.slo.gap, Promise.GAP, entry)

    @property
    def next(self) -> float:
        """No deadline is due before; infinity if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def due(self, now: float) -> list[Miss]:
        """Deadlines that have passed unmet, in order of time."""
        misses = []
        while self._heap and self._heap[0][0] <= now:
            at, _, promise, evictions, entry = heapq.heappop(self._heap)
            if _unmet(entry, promise, evictions):
                bound = getattr(entry.request.slo, promise)
                late = now - at
                detail = f"the {promise} promise of {bound:g} s was missed {late:.3f} s ago"
                misses.append(Miss(entry, promise, detail))
        return misses

    def _push(self, at: float, promise: Promise, entry: Entry) -> None:
        # Most requests end long before their deadlines, which would keep all of them for so long.
        if len(self._heap) >= self._most:
            self._heap = [each for each in self._heap if _unmet(each[4], each[2], each[3])]
            heapq.heapify(self._heap)
            self._most = max(_FEW, 2 * len(self._heap))
        heapq.heappush(self._heap, (at, entry.seq, promise, entry.evictions, entry))


def _unmet(entry: Entry, promise: Promise, evictions: int) -> bool:
    if entry.state is State.ENDED:
        return False
    if promise is Promise.TTFT:
        return entry.sampled_in == 0
    if promise is Promise.GAP:
        return entry.state is State.EVICTED and entry.evictions == evictions
    return True
