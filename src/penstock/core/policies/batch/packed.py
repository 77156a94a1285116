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
Cost: O(n log n); 10,000 requests take some 25 ms.  The recurrence as it stands, over
``n * Nmax`` pairs, takes seconds in Python.
Limits: equal slices for all; no deadlines.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.core.forecast.slices import SliceCost


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
    constant = [known[length][0] for length in lengths]
    each = [known[length][1] for length in lengths]
    reach = _reach(lengths, cost, size)
    cut = [0] * count
    # The queue, from ``head`` on: cuts, the best time up to each, and where each becomes the best.
    places, times, firsts, head = [0], [0.0], [0], 0
    for index in range(count):
        while head + 1 < len(places) and firsts[head + 1] <= index:
            head += 1
        place, after = places[head], index + 1
        cut[index] = place
        if after == count:
            break
        seconds = times[head] + constant[index] + (after - place) * each[index]
        first = after
        while len(places) > head:
            first = _overtakes(after, seconds, places[-1], times[-1], each, reach)
            if first > firsts[-1] and first > after:
                break
            places.pop()
            times.pop()
            firsts.pop()
            first = after
        if first < count:
            places.append(after)
            times.append(seconds)
            firsts.append(first)
    ends, end = [], count
    while end:
        ends.append(end)
        end = cut[end - 1]
    return ends[::-1]


def _reach(lengths: Sequence[int], cost: SliceCost, size: int) -> list[int]:
    """For a batch that begins at each place: behind which request it can no longer end."""
    fits = {length: min(size or len(lengths), cost.fits(length)) for length in set(lengths)}
    most = np.array([fits[length] for length in lengths])
    # The batch that ends with a request can begin here or later; that place never falls.
    lowest = np.arange(1, len(lengths) + 1) - most
    reach: list[int] = lowest.searchsorted(np.arange(len(lengths)), side="right").tolist()
    return reach


def _overtakes(
    place: int,
    seconds: float,
    old_place: int,
    old_seconds: float,
    each: Sequence[float],
    reach: Sequence[int],
) -> int:
    """The first request from ``place`` on for whose batch this cut is not worse than an old one.

    It is not where ``old_seconds + (i + 1 - old_place) x_i >= seconds + (i + 1 - place) x_i``.
    """
    price = (seconds - old_seconds) / (place - old_place)
    if each[place] >= price:
        return place
    end = reach[old_place]
    if end <= place:
        return place
    # Where the old one's memory ends in any case.
    return bisect_left(each, price, place, end)
