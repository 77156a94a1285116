"""The waiting requests, in the order that the policy's keys give."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from penstock.core.entry import Entry
from penstock.core.policies.base import OrderKey

_SPARE = 64
_Place = tuple[bool, OrderKey, int, int]


class WaitingQueue:
    """A queue in order, from which entries may also be taken out of turn.

    Demoted entries come after all others.  Whoever comes after all that are in line, as nearly
    everyone does where the order is that of arrival, joins the line: push, peek and removal are
    O(1).  The others go to a heap: push and peek are O(log n), removal is O(1), all amortized (the
    place is emptied, and cleared away later).
    """

    def __init__(self) -> None:
        self._line: deque[_Place] = deque()
        self._heap: list[_Place] = []
        self._live: dict[int, tuple[Entry, int]] = {}
        self._pushes = 0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._live.values())

    def push(self, entry: Entry) -> None:
        """Add an entry that is not in the queue."""
        self._pushes += 1
        self._live[entry.seq] = (entry, self._pushes)
        place = (entry.demoted, entry.key, entry.seq, self._pushes)
        line = self._line
        while line and self._at(line[-1]) is None:
            line.pop()
        if line and place < line[-1]:
            heapq.heappush(self._heap, place)
        else:
            line.append(place)
        self.tokens += entry.total

    def peek(self) -> Entry | None:
        """The first entry, or None."""
        line, heap = self._line, self._heap
        first: Entry | None = None
        while line and (first := self._at(line[0])) is None:
            line.popleft()
        if not heap:
            return first
        other: Entry | None = None
        while heap and (other := self._at(heap[0])) is None:
            heapq.heappop(heap)
        if other is None or (first is not None and line[0] < heap[0]):
            return first
        return other

    def remove(self, entry: Entry) -> None:
        """Take an entry out, wherever it stands."""
        del self._live[entry.seq]
        self.tokens -= entry.total
        # Behind a head that does not move, empty places would pile up for as long as it stands.
        if len(self._line) + len(self._heap) > 2 * len(self._live) + _SPARE:
            self._line = deque([place for place in self._line if self._at(place)])
            self._heap = [place for place in self._heap if self._at(place)]
            heapq.heapify(self._heap)

    def _at(self, place: _Place) -> Entry | None:
        """Who stands at a place; None if it is empty."""
        live = self._live.get(place[2])
        return live[0] if live is not None and live[1] == place[3] else None
