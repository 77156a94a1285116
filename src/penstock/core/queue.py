"""The waiting requests, in the order that the policy's keys give."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from penstock.core.entry import Entry
from penstock.core.policies.base import OrderKey

_SPARE = 64


class WaitingQueue:
    """A heap from which entries may also be taken out of turn.

    Demoted entries come after all others.  Push and peek are O(log n), removal is O(1), both
    amortized (the place in the heap is emptied, and cleared away later).
    """

    def __init__(self) -> None:
        self._heap: list[tuple[bool, OrderKey, int, int]] = []
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
        heapq.heappush(self._heap, (entry.demoted, entry.key, entry.seq, self._pushes))
        self.tokens += entry.total

    def peek(self) -> Entry | None:
        """The first entry, or None."""
        while self._heap:
            _, _, seq, push = self._heap[0]
            live = self._live.get(seq)
            if live is not None and live[1] == push:
                return live[0]
            heapq.heappop(self._heap)
        return None

    def remove(self, entry: Entry) -> None:
        """Take an entry out, wherever it stands."""
        del self._live[entry.seq]
        self.tokens -= entry.total
        # Behind a head that does not move, empty places would pile up for as long as it stands.
        if len(self._heap) > 2 * len(self._live) + _SPARE:
            pushes = {push for _, push in self._live.values()}
            self._heap = [place for place in self._heap if place[3] in pushes]
            heapq.heapify(self._heap)
