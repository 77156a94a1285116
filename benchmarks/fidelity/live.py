"""The native engine in real time, in this process, under the very loop that the server turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

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


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


def live(
    source: Source, engine: Engine, policy: Policy, prompts: Sequence[Sequence[int]]
) -> LiveRun:
    """Serve until the source is dry.

    Args:
        engine: whose plan numbers begin at 1.
        prompts: token ids by request.
    """
    steps: list[StepRecord] = []
    recording = RecordingEngine(engine, steps.append)
    scheduler = Scheduler(engine.capabilities, policy)
    gc.collect()
    gc.freeze()
    clock = _Clock()
    runtime = Runtime(scheduler, recording, clock)
    records = _loop(source, runtime, clock, prompts)
    seconds = clock()
    gc.unfreeze()
    return LiveRun(records, seconds, scheduler.evictions, steps)


def _loop(
    source: Source, runtime: Runtime, clock: _Clock, prompts: Sequence[Sequence[int]]
) -> list[Record]:
    open_jobs: dict[RequestId, tuple[Job, Track]] = {}
    records: list[Record] = []
    while True:
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
