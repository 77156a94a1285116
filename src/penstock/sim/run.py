"""One simulated run: requests in, the production runtime on a virtual clock, records out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from penstock.bench.goodput import Latency
from penstock.core.engine import Work
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime, StepOutput
from penstock.core.scheduler import Scheduler
from penstock.core.types import SLO, Capabilities, Ended, OnMiss, Request, RequestId, StepPlan
from penstock.sim.clock import VirtualClock
from penstock.sim.engine import SimEngine
from penstock.sim.link import Link
from penstock.sim.ticks import TickTimes
from penstock.sim.track import Track

_NO_SLO = SLO()


class Job(NamedTuple):
    """A request to simulate.

    Attributes:
        id: its name.
        arrival: when it comes, in seconds.
        prompt, output: tokens; the output is its true length, hidden from policies.
        cap: what policies are told.
        request: its index in its workload; ``attempt`` counts the tries at it, from 0.
    """

    id: RequestId
    arrival: float
    prompt: int
    output: int
    cap: int
    slo: SLO = _NO_SLO
    slo_class: str = "default"
    on_miss: OnMiss = OnMiss.KEEP
    priority: int = 0
    prefix: tuple[bytes, ...] = ()
    request: int = 0
    attempt: int = 0


class Source(Protocol):
    """Where requests come from: open loop (a schedule) or closed loop (clients)."""

    def due(self, now: float) -> Iterable[Job]:
        """Jobs that have come by now, each once."""
        ...

    def next_arrival(self) -> float | None:
        """When the next one comes; None: not before something ends, or never."""
        ...

    def ended(self, record: Record, now: float) -> None:
        """A request ended; a client may send its next one."""
        ...


class Record(NamedTuple):
    """What became of a job.

    Attributes:
        at: when it ended, in seconds.
        track: its tokens.
    """

    job: Job
    ended: Ended
    at: float
    track: Track

    @property
    def latency(self) -> Latency:
        """TTFT, TPOT, gap and e2e as its client saw them."""
        track, sent = self.track, self.job.arrival
        first, last = track.first_at, track.last_at
        if first is None or last is None:
            return Latency(None, None, None, None)
        rest = self.ended.output_tokens - 1
        tpot = (last - first) / rest if rest > 0 else None
        return Latency(first - sent, tpot, track.gap if rest > 0 else None, last - sent)


@dataclass(slots=True)
class Run:
    """What came of a run.

    Attributes:
        records: by request, in the order in which they ended.
        ticks: when decode steps ended.
        seconds: simulated time.
        steps: steps with work in them.
        memory: mean share of the KV memory in use over decode steps.
        evictions: in all.
        cached_tokens: tokens with which requests began because they were in the prefix cache.
        swapped_tokens: tokens whose KV went to host memory.
    """

    records: list[Record]
    ticks: TickTimes
    seconds: float
    steps: int
    memory: float
    evictions: int
    cached_tokens: int = 0
    swapped_tokens: int = 0

    @property
    def decode_steps(self) -> int:
        """Steps in which someone decoded."""
        return self.ticks.count

    def token_times(self, record: Record) -> list[float]:
        """When each output token of a request came, in seconds, in order."""
        times: list[float] = []
        for stretch in record.track.stretches:
            if stretch.sampled_at is not None:
                times.append(stretch.sampled_at)
            times.extend(self.ticks.times(stretch.first, stretch.last))
        return times


class Seen(NamedTuple):
    """What a watcher is shown after a step, or after a stretch of steps in which nothing changed.

    Attributes:
        plan: the plan that was run, ``output.steps`` times.
        began, now: seconds before and after.
    """

    scheduler: Scheduler
    plan: StepPlan
    output: StepOutput
    began: float
    now: float


Watch = Callable[[Seen], None]


def run(
    source: Source,
    capabilities: Capabilities,
    policy: Policy,
    latency: LatencyModel,
    *,
    enforce_caps: bool = True,
    watch: Watch | None = None,
    bus: Link | None = None,
) -> Run:
    """Simulate until the source has no more jobs and all have ended.

    Args:
        enforce_caps: end requests at their cap, as servers do.
        watch: called after every step, or stretch of steps in which nothing changed.
        bus: to host memory, if the machine keeps KV of evicted requests there.
    """
    clock = VirtualClock()
    engine = SimEngine(capabilities, latency, clock, bus=bus)
    scheduler = Scheduler(engine.capabilities, policy, enforce_caps=enforce_caps)
    runtime = Runtime(scheduler, engine, clock)
    with no_collections():
        records, steps = _loop(source, runtime, engine, clock, watch)
    ticks = engine.ticks
    share = scheduler.block_steps / ticks.count / capabilities.kv_blocks if ticks.count else 0.0
    cached, swapped = engine.cached_tokens, engine.swapped_tokens
    return Run(records, ticks, clock.now, steps, share, scheduler.evictions, cached, swapped)


def _loop(
    source: Source, runtime: Runtime, engine: SimEngine, clock: VirtualClock, watch: Watch | None
) -> tuple[list[Record], int]:
    """Until the source is dry; the records, and the number of steps."""
    open_jobs: dict[RequestId, tuple[Job, Track]] = {}
    records: list[Record] = []
    steps = 0
    while True:
        for job in source.due(clock.now):
            _add(runtime, job)
            open_jobs[job.id] = (job, engine.track(job.id))
        arrival = source.next_arrival()
        engine.wake_at = math.inf if arrival is None else arrival
        began = clock.now
        output = runtime.step()
        if output is None:
            if arrival is None:
                return records, steps
            clock.advance_to(arrival)
            continue
        plan = engine.plan
        if plan is not None and (plan.decode or plan.chunks):
            steps += output.steps
        for ended in output.ended:
            job, track = open_jobs.pop(ended.id)
            engine.settle(track)
            record = Record(job, ended, clock.now, track)
            records.append(record)
            source.ended(record, clock.now)
        if watch is not None and plan is not None:
            watch(Seen(runtime.scheduler, plan, output, began, clock.now))


def _add(runtime: Runtime, job: Job) -> None:
    request = Request(
        job.id, job.prompt, job.cap, job.arrival, job.slo, job.slo_class, job.priority,
        job.on_miss, job.prefix,
    )  # fmt: skip
    runtime.add(request, Work(range(job.prompt), trace_length=job.output))


@contextmanager
def no_collections() -> Iterator[None]:
    """Hold the cyclic garbage collector back: it would walk all records again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
