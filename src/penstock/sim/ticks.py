"""When decode steps ended: a segment per uninterrupted stretch, not a number per token.

Problem: millions of token times cost more than all of the scheduling, and are asked for twice
per request: the largest gap, and the last token.

Source: our own; the stretch's form follows from a step time that is affine in the context.

Rule: *ticks* are decode steps, counted from 1.  A segment is ``count`` ticks in a row whose steps
take ``first, first + increase, first + 2 increase, ...`` seconds from ``start`` on.  The gap at a
tick is its time minus the tick's before.  Gaps that a later one reaches or exceeds can never be
the largest from somewhere up to now, so only a falling list of gaps is kept, and the largest
since any tick is found in it by bisection.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple


class Segment(NamedTuple):
    """Ticks ``tick .. tick + steps - 1``; times in seconds."""

    tick: int
    steps: int
    start: float
    first: float
    increase: float

    def time(self, tick: int) -> float:
        """When one of its ticks ended."""
        steps = tick - self.tick + 1
        return self.start + steps * self.first + self.increase * (steps * (steps - 1) // 2)


class TickTimes:
    """All segments of a run.

    Attributes:
        count: ticks so far.
        segments: in order.
    """

    __slots__ = ("_gap_ticks", "_gaps", "_last", "count", "segments")

    def __init__(self) -> None:
        self.count = 0
        self.segments: list[Segment] = []
        self._last = 0.0
        self._gap_ticks: list[int] = []
        self._gaps: list[float] = []

    def append(self, count: int, start: float, first: float, increase: float) -> None:
        """Further ticks, the first of which is the first step after ``start``."""
        tick = self.count + 1
        self.segments.append(Segment(tick, count, start, first, increase))
        self._push(tick, start + first - self._last)
        self.count += count
        if count > 1:
            self._push(self.count, first + (count - 1) * increase)
        steps = count * (count - 1) // 2
        self._last = start + count * first + increase * steps

    def time(self, tick: int) -> float:
        """When a tick ended."""
        index = bisect_right(self.segments, tick, key=lambda segment: segment.tick) - 1
        return self.segments[index].time(tick)

    @property
    def last(self) -> float:
        """When the latest tick ended; 0 before the first."""
        return self._last

    def times(self, first: int, last: int) -> list[float]:
        """When the ticks from ``first`` to ``last`` ended, in order."""
        found: list[float] = []
        index = bisect_right(self.segments, first, key=lambda segment: segment.tick) - 1
        while first <= last:
            segment = self.segments[index]
            stop = min(last, segment.tick + segment.steps - 1)
            found.extend(segment.time(tick) for tick in range(first, stop + 1))
            first, index = stop + 1, index + 1
        return found

    def largest_gap(self, after: int) -> float:
        """The largest gap at a tick later than ``after``, 0 if there is none.

        ``after`` is the first tick of a segment.
        """
        index = bisect_right(self._gap_ticks, after)
        return self._gaps[index] if index < len(self._gaps) else 0.0

    def _push(self, tick: int, gap: float) -> None:
        gaps, ticks = self._gaps, self._gap_ticks
        while gaps and gaps[-1] <= gap:
            gaps.pop()
            ticks.pop()
        gaps.append(gap)
        ticks.append(tick)
