"""Independent simulations in several processes.

Problem: a grid of runs is as fast as the cores it uses, and one bad run must not cost the others.
Rule: each job is bytes in and bytes out, in a process of its own pool.  An exception is the job's
own outcome.  If a process dies, its pool is made anew; the jobs that were under way are then run
one at a time, so that only the one that kills its process is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

Work: TypeAlias = Callable[[bytes], bytes]
"""A function at the top of its module."""


class Outcome(NamedTuple):
    """What came of a job (its place among the jobs): ``value``, or the ``error`` that ended it."""

    job: int
    value: bytes | None
    error: str | None


def default_workers() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def outcomes(work: Work, jobs: Sequence[bytes], workers: int) -> Iterator[Outcome]:
    """Run all jobs; yields in the order in which they end.

    Args:
        work: what to do with a job.
        jobs: its inputs.
        workers: processes; with 1, all is done in this one.

    Raises:
        ValueError: fewer than one worker.
    """
    if workers < 1:
        msg = f"jobs is {workers}; it must be at least 1 process"
        raise ValueError(msg)
    if workers == 1 or len(jobs) == 1:
        for index, job in enumerate(jobs):
            yield Outcome(index, *guarded(work, job))
        return
    waiting = deque(range(len(jobs)))
    suspects: list[int] = []
    while waiting:
        with _pool(min(workers, len(waiting))) as pool:
            yield from _until_broken(pool, work, jobs, waiting, suspects, workers)
    for index in suspects:
        with _pool(1) as pool:
            try:
                yield Outcome(index, *pool.submit(guarded, work, jobs[index]).result())
            except BrokenProcessPool:
                yield Outcome(index, None, "its process died; perhaps it was out of memory")


def _until_broken(
    pool: ProcessPoolExecutor,
    work: Work,
    jobs: Sequence[bytes],
    waiting: deque[int],
    suspects: list[int],
    workers: int,
) -> Iterator[Outcome]:
    """Run what waits until nothing does, or until a process dies: its jobs become suspects."""
    flying: dict[Future[tuple[bytes | None, str | None]], int] = {}
    while waiting or flying:
        try:
            # No more than can run: what is under way when a process dies is run again.
            while waiting and len(flying) < workers:
                future = pool.submit(guarded, work, jobs[waiting[0]])
                flying[future] = waiting.popleft()
        except BrokenProcessPool:
            suspects.extend(flying.values())
            return
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        for future in done:
            if future.exception() is None:
                yield Outcome(flying.pop(future), *future.result())
        if any(future in flying for future in done):
            suspects.extend(flying.values())
            return


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end at once when this one is interrupted."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """In a new process: end with the parent, and without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def guarded(work: Work, job: bytes) -> tuple[bytes | None, str | None]:
    """A job's value, or the words of the error that ended it."""
    try:
        return work(job), None
    except (ValueError, OSError) as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other jobs go on
        return None, f"{type(error).__name__}: {error}"
