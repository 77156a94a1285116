"""The waiting requests, in the order that the policy's keys give."""

from __future__ import annotations

import heapq
from collections import deque

from penstock.core.entry import Entry
from penstock.core.policies.base import OrderKey
from penstock.core.prompt_table import PromptTable

_SPARE = 64
_Place = tuple[bool, OrderKey, int, int, Entry]


class WaitingQueue:
    """A queue in order, from which entries may also be taken out of turn.

    Demoted entries come after all others.  Whoever comes after all that are in line, as nearly
    everyone does where the order is that of arrival, joins the line: push, peek and removal are
    O(1).  The others go to a heap: push and peek are O(log n), removal is O(1), all amortized (the
    place is emptied, and cleared away later).

    Attributes:
        tokens: that those in it must have KV for.
        table: the same entries as columns, if anybody wants them.
    """

    def __init__(self, *, table: bool = False) -> None:
        self._line: deque[_Place] = deque()
        self._heap: list[_Place] = []
        self._count = 0
        self._pushes = 0
        self.tokens = 0
        self.table = PromptTable() if table else None

    def __len__(self) -> int:
        return self._count

    def push(self, entry: Entry) -> None:
        """Add an entry that is not in the queue."""
        self._count += 1
        self._pushes += 1
        entry.place = self._pushes
        place = (entry.demoted, entry.key, entry.seq, self._pushes, entry)
        line = self._line
        while line and not _taken(line[-1]):
            line.pop()
        if line and place < line[-1]:
            heapq.heappush(self._heap, place)
        else:
            line.append(place)
        self.tokens += entry.total
        if self.table is not None:
            self.table.join(entry)

    def peek(self) -> Entry | None:
        """The first entry, or None."""
        line, heap = self._line, self._heap
        first: _Place | None = None
        while line and not _taken(first := line[0]):
            line.popleft()
            first = None
        while heap and not _taken(heap[0]):
            heapq.heappop(heap)
        if heap and (first is None or heap[0] < first):
            first = heap[0]
        return None if first is None else first[4]

    def remove(self, entry: Entry) -> None:
        """Take an entry out, wherever it stands."""
        assert entry.place, f"request {entry.request.id} does not wait"
        entry.place = 0
        self._count -= 1
        self.tokens -= entry.total
        if self.table is not None:
            self.table.leave(entry)
        # Behind a head that does not move, empty places would pile up for as long as it stands.
        if len(self._line) + len(self._heap) > 2 * self._count + _SPARE:
            self._line = deque([place for place in self._line if _taken(place)])
            self._heap = [place for place in self._heap if _taken(place)]
            heapq.heapify(self._heap)


def _taken(place: _Place) -> bool:
    """Whether the one who was given this place still stands there."""
    return place[4].place == place[3]
