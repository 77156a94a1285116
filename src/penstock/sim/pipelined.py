"""Arrivals as a server sees them that plans a step while the one before it runs.

Problem: engines that overlap planning with computing (vLLM with asynchronous scheduling) plan a
step when the one before it starts, so whoever comes meanwhile waits for that one as well: a
whole step more of TTFT, a good part of it on a machine that is not overloaded.
Source: our own; the loop is vLLM's, asynchronous by default since its version 0.14.
Rule: a job counts from the first plan made after it came, and a plan is made one step ahead; to an
idle machine it counts at once.
Limits: places and memory of those that ended are free a step too early.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.sim.run import Job, Record
from penstock.sim.sources import OpenLoop


class Pipelined:
    """An open loop before a machine that plans one step ahead.

    Args:
        jobs: in order of arrival.

    Raises:
        ValueError: an arrival is no time, or they are not in order.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._source = OpenLoop(jobs)
        self._began = 0.0
        self._open = 0

    def due(self, now: float) -> Iterable[Job]:
        """Jobs that had come when the step that has just ended began."""
        jobs = list(self._source.due(self._began if self._open else now))
        self._open += len(jobs)
        self._began = now
        return jobs

    def next_arrival(self) -> float | None:
        """The next one's arrival, which may have passed."""
        return self._source.next_arrival()

    def ended(self, record: Record, now: float) -> None:
        """One less is in the machine."""
        self._source.ended(record, now)
        self._open -= 1
