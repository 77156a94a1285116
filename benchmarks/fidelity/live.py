"""The native engine in real time, in this process, under the very loop that the server turns."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from beside import Beside

from penstock.core.engine import Engine, Work
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import Request, RequestId
from penstock.sim.recording import RecordingEngine, StepRecord
from penstock.sim.run import Job, Record, Source
from penstock.sim.track import Track


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What came of a run in real time.

    Attributes:
        records: in the order in which requests ended, with the times that the loop saw.
        seconds: from the start to the last end.
        evictions: in all.
        steps: what each step computed and took.
    """

    records: list[Record]
    seconds: float
    evictions: int
    steps: list[StepRecord]


class OtherWork:
    """CPU time that went to anyone but this process, since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._own = time.process_time()
        self._all = _busy_seconds()

    def cores(self) -> float:
        """In cores, the hypervisor's theft included."""
        elapsed = time.perf_counter() - self._began
        own = time.process_time() - self._own
        return max(0.0, _busy_seconds() - self._all - own) / elapsed


def _busy_seconds() -> float:
    """CPU seconds of the whole machine since it started: all but idle and waiting for a disk."""
    first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, soft, stolen = map(int, first)
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


class _Clock:
    """Seconds since it was made, but for those in which it was stopped."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._zero

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time does not pass."""
        began = time.perf_counter()
        yield
        self._zero += time.perf_counter() - began


def live(
    source: Source,
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    beside: Beside,
) -> LiveRun:
    """Serve until the source is dry.

    Args:
        engine: whose plan numbers begin at 1.
        prompts: token ids by request.
        beside: gets its slices of time, in which the clock of this run stands still.
    """
    steps: list[StepRecord] = []
    scheduler = Scheduler(engine.capabilities, policy)
    gc.collect()
    gc.freeze()
    beside.begin()
    clock = _Clock()
    recording = RecordingEngine(engine, steps.append, clock)
    runtime = Runtime(scheduler, recording, clock)
    records = _loop(source, runtime, clock, prompts, beside)
    seconds = clock()
    gc.unfreeze()
    return LiveRun(records, seconds, scheduler.evictions, steps)


def _loop(
    source: Source,
    runtime: Runtime,
    clock: _Clock,
    prompts: Sequence[Sequence[int]],
    beside: Beside,
) -> list[Record]:
    open_jobs: dict[RequestId, tuple[Job, Track]] = {}
    records: list[Record] = []
    while True:
        if beside.due(clock()):
            with clock.stopped():
                beside.slice(clock())
        for job in source.due(clock()):
            request = Request(job.id, job.prompt, job.cap, job.arrival, job.slo, job.slo_class)
            runtime.add(request, Work(prompts[job.request], trace_length=job.output))
            open_jobs[job.id] = (job, Track(job.id, job.prompt, job.output))
        output = runtime.step()
        now = clock()
        if output is None:
            arrival = source.next_arrival()
            if arrival is None:
                return records
            time.sleep(max(0.0, arrival - now))
            continue
        for request_id in output.tokens:
            _token(open_jobs[request_id][1], now)
        for ended in output.ended:
            job, track = open_jobs.pop(ended.id)
            record = Record(job, ended, now, track)
            records.append(record)
            source.ended(record, now)


def _token(track: Track, now: float) -> None:
    """A token came."""
    if track.last_at is None:
        track.first_at = now
    else:
        track.gap = max(track.gap or 0.0, now - track.last_at)
    track.last_at = now
    track.generated += 1
