"""Independent simulations on a Ray cluster.

Problem: a grid of runs can want more cores than one machine has.
Rule: each job is a task for one CPU, and where it runs, and how often it is tried again when a
machine is lost, is Ray's business.  What a job says of itself is the same as in
:mod:`penstock.sim.parallel`.
Limits: all machines need this version of Penstock, and traces under the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import ray
from ray.exceptions import RayError

from penstock.cluster.machines import RayUnavailableError, join
from penstock.sim.parallel import Outcome, Work, guarded

_TRIES = 2
_AHEAD = 2


def ray_outcomes(work: Work, jobs: Sequence[bytes], address: str | None) -> Iterator[Outcome]:
    """Run all jobs; yields in the order in which they end.

    Args:
        work: what to do with a job.
        jobs: its inputs.
        address: of the cluster; None: Ray is started on this machine, for as long as this lasts.

    Raises:
        ValueError: there is no cluster at that address; names the option.
    """
    if not jobs:
        return
    try:
        join(address)
    except RayUnavailableError as error:
        msg = f"--ray {address or 'local'}: {error}"
        raise ValueError(msg) from None
    try:
        task = ray.remote(guarded).options(
            num_cpus=1, max_retries=_TRIES - 1, scheduling_strategy="SPREAD"
        )
        waiting = iter(range(len(jobs)))
        room = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        flying: dict[ray.ObjectRef[tuple[bytes | None, str | None]], int] = {}
        while True:
            # Enough that no CPU waits, and no more: a cluster may be given more of them meanwhile.
            for index in islice(waiting, room - len(flying)):
                flying[task.remote(work, jobs[index])] = index
            if not flying:
                return
            done, _ = ray.wait(list(flying))
            for ref in done:
                yield _outcome(flying.pop(ref), ref)
    finally:
        ray.shutdown()


def _outcome(index: int, ref: ray.ObjectRef[tuple[bytes | None, str | None]]) -> Outcome:
    try:
        return Outcome(index, *ray.get(ref))
    except RayError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Outcome(index, None, f"its process died {_TRIES} times: {first}")
