"""Where simulated requests come from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

from penstock.sim.run import Job, Record


class OpenLoop:
    """Jobs at their arrival times, whatever the system does.

    Args:
        jobs: in order of arrival.

    Raises:
        ValueError: the arrivals are not in order.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
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


class ClosedLoop:
    """Clients with one outstanding request each, who take jobs from one list.

    Args:
        jobs: in the order in which they are taken; their arrivals are set when they are sent.
        clients: how many.
    """

    def __init__(self, jobs: Sequence[Job], clients: int) -> None:
        if clients < 1:
            msg = f"clients is {clients}; it must be at least 1"
            raise ValueError(msg)
        self._jobs = deque(jobs)
        self._idle = clients

    def due(self, now: float) -> Iterable[Job]:
        """One job for each idle client."""
        jobs = []
        while self._jobs and self._idle:
            jobs.append(self._jobs.popleft()._replace(arrival=now))
            self._idle -= 1
        return jobs

    def next_arrival(self) -> float | None:
        """Never by the clock: clients wait for answers."""
        return None

    def ended(self, record: Record, now: float) -> None:
        """The client is idle again."""
        del record, now
        self._idle += 1
