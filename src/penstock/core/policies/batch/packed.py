"""Batches of least total time, by dynamic programming.

Problem: a static batch is padded to its longest request and waits for it; small batches waste
the accelerator, large ones overflow its memory.
Source: SCLS (arXiv 2406.13511), the dynamic-programming batcher; the recurrence after third-party
notes of it, the search our own.
Rule: sort by length; ``best[i] = min over j < i of best[j] + T(i - j, length[i])`` over those
``j`` for which the memory suffices; batches are runs of the sorted order.
Search: for one length, ``T(n, L) = c(L) + n x(L)`` with ``x`` not falling in ``L``.  So if a
later cut ``j`` is better than an earlier one for some ``i``, it is for all that follow, and the
memory, too, only rules out earlier ones as ``i`` grows.  The cuts that are still of use wait in a
queue, each with the first ``i`` that it is the best for; that is found by bisection.
Cost: O(n log n); 10,000 requests take some 20 ms.  The recurrence as it stands, over
``n * Nmax`` pairs, takes seconds in Python.
Limits: equal slices for all; no deadlines.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.core.forecast.slices import SliceCost


class _Cut(NamedTuple):
    """A place to cut: after ``place`` requests, in ``seconds``; the best from ``first`` on."""

    place: int
    seconds: float
    first: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Batches that take the least time in all.

    Attributes:
        size: most requests of a batch; 0: as many as the memory holds.
    """

    size: int = 0

    needs_cost = True
    together = True

    def __post_init__(self) -> None:
        if self.size < 0:
            msg = f"batch_size is {self.size}; it must be 0 (what fits) or more"
            raise ValueError(msg)

    def batches(self, lengths: Sequence[int], cost: SliceCost | None) -> list[list[int]]:
        """Indices of the requests of each batch.

        Args:
            lengths: tokens of each pooled request, those it generated included.
            cost: of slices; must be given.
        """
        assert cost is not None
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        ends = best_cuts([lengths[index] for index in order], cost, self.size)
        return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def best_cuts(lengths: Sequence[int], cost: SliceCost, size: int = 0) -> list[int]:
    """Where to cut an ascending list of lengths: the end of each batch, in order.

    Args:
        size: most requests of a batch; 0 is no limit but the cost's own.
    """
    count = len(lengths)
    if not count:
        return []
    known = {length: cost.line(length) for length in set(lengths)}
    each = [known[length][1] for length in lengths]
    reach = _reach(lengths, cost, size)
    cut = [0] * count
    queue = deque([_Cut(0, 0.0, 0)])
    for index, length in enumerate(lengths):
        while len(queue) > 1 and queue[1].first <= index:
            queue.popleft()
        place, before, _ = queue[0]
        constant, price = known[length]
        cut[index] = place
        if index + 1 < count:
            seconds = before + constant + (index + 1 - place) * price
            _append(queue, index + 1, seconds, each, reach)
    ends, end = [], count
    while end:
        ends.append(end)
        end = cut[end - 1]
    return ends[::-1]


def _reach(lengths: Sequence[int], cost: SliceCost, size: int) -> list[int]:
    """For a batch that begins at each place: behind which request it can no longer end."""
    fits = {length: cost.fits(length) for length in set(lengths)}
    limit = size or len(lengths)
    reach, end = [], 0
    for start in range(len(lengths)):
        end = max(end, start + 1)
        while end < len(lengths) and end - start < min(limit, fits[lengths[end]]):
            end += 1
        reach.append(end)
    return reach


def _append(
    queue: deque[_Cut], place: int, seconds: float, each: Sequence[float], reach: Sequence[int]
) -> None:
    """Put a later cut in the queue, and those out that are of no use with it."""
    first = place
    while queue:
        old = queue[-1]
        first = _overtakes(old, place, seconds, each, reach)
        if first > max(old.first, place):
            break
        queue.pop()
    else:
        first = place
    if first < len(each):
        queue.append(_Cut(place, seconds, first))


def _overtakes(
    old: _Cut, place: int, seconds: float, each: Sequence[float], reach: Sequence[int]
) -> int:
    """The first request from ``place`` on for whose batch this cut is not worse than an old one."""
    # It is not where old.seconds + (i + 1 - old.place) x_i >= seconds + (i + 1 - place) x_i.
    price = (seconds - old.seconds) / (place - old.place)
    return min(bisect_left(each, price, lo=place), max(place, reach[old.place]))
