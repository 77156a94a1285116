"""Where simulated requests come from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from penstock.core.types import RequestId
from penstock.sim.outcome import attempt_of
from penstock.sim.run import Job, Record

_AGAIN = "+"  # a dispatcher names the slices of request 7 7~1, 7~2, ...


def first_try(name: RequestId) -> RequestId:
    """The id of a job's first try: the second at job 7 is named 7+1."""
    return name.partition(_AGAIN)[0]


class OpenLoop:
    """Jobs at their arrival times, whatever the system does.

    Args:
        jobs: in order of arrival.

    Raises:
        ValueError: an arrival is no time, or they are not in order.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not math.isfinite(job.arrival):
                msg = f"job {job.id} arrives at {job.arrival}; it must be a number of seconds"
                raise ValueError(msg)
        for before, after in pairwise(jobs):
            if after.arrival < before.arrival:
                msg = (
                    f"job {after.id} arrives at {after.arrival}, before {before.id} "
                    f"({before.arrival}); jobs must be in order of arrival"
                )
                raise ValueError(msg)
        self._jobs = deque(jobs)

    def due(self, now: float) -> Iterable[Job]:
        """Jobs that have come by now."""
        jobs = []
        while self._jobs and self._jobs[0].arrival <= now:
            jobs.append(self._jobs.popleft())
        return jobs

    def next_arrival(self) -> float | None:
        """The next one's arrival."""
        return self._jobs[0].arrival if self._jobs else None

    def ended(self, record: Record, now: float) -> None:
        """Nothing follows from an end."""


def met_its_slo(record: Record) -> bool:
    """Whether a job completed and kept every bound."""
    return attempt_of(record).met


class ClosedLoop:
    """Clients with one outstanding request each, who take jobs from one list.

    Args:
        jobs: in the order in which they are taken; their arrivals are set when they are sent.
        clients: how many.
        retries: how often a job that did not end well goes back to the end of the list.
        met: whether a job ended well.
        until: no job is sent from then on, in seconds.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        clients: int,
        *,
        retries: int = 0,
        met: Callable[[Record], bool] = met_its_slo,
        until: float = math.inf,
    ) -> None:
        for name, value, least in (("clients", clients, 1), ("retries", retries, 0)):
            if value < least:
                msg = f"{name} is {value}; it must be at least {least}"
                raise ValueError(msg)
        self._jobs = deque(jobs)
        self._idle = clients
        self._retries = retries
        self._met = met
        self._until = until

    def due(self, now: float) -> Iterable[Job]:
        """One job for each idle client."""
        jobs = []
        while self._jobs and self._idle and now < self._until:
            jobs.append(self._jobs.popleft()._replace(arrival=now))
            self._idle -= 1
        return jobs

    def next_arrival(self) -> float | None:
        """Never by the clock: clients wait for answers."""
        return None

    def ended(self, record: Record, now: float) -> None:
        """The client is idle again; a job that failed is to be tried again."""
        del now
        self._idle += 1
        job = record.job
        if job.attempt < self._retries and not self._met(record):
            again = job.attempt + 1
            name = first_try(job.id)
            self._jobs.append(job._replace(id=f"{name}{_AGAIN}{again}", attempt=again))
