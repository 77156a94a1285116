"""One simulated run: requests in, the production runtime on a virtual clock, records out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from penstock.bench.goodput import Latency, Timeline, latency_of
from penstock.core.engine import Work
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import SLO, Capabilities, Ended, OnMiss, Request, RequestId
from penstock.sim.clock import VirtualClock
from penstock.sim.engine import SimEngine, Stretch

NO_LATENCY = Latency(None, None, None, None)


@dataclass(frozen=True, slots=True)
class Job:
    """A request to simulate.

    Attributes:
        id: its name.
        arrival: when it comes, in seconds.
        prompt, output: tokens; the output is its true length, hidden from policies.
        cap: what policies are told.
        index: of the request in its workload; ``attempt`` counts the tries at it, from 0.
    """

    id: RequestId
    arrival: float
    prompt: int
    output: int
    cap: int
    slo: SLO = field(default_factory=SLO)
    slo_class: str = "default"
    on_miss: OnMiss = OnMiss.KEEP
    priority: int = 0
    prefix: tuple[bytes, ...] = ()
    index: int = 0
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


@dataclass(slots=True)
class Record:
    """What became of a job.

    Attributes:
        at: when it ended, in seconds.
        latency: TTFT, TPOT, gap and e2e as its client saw them.
    """

    job: Job
    ended: Ended
    at: float
    stretches: list[Stretch] = field(default_factory=list)
    latency: Latency = NO_LATENCY


@dataclass(slots=True)
class Run:
    """What came of a run.

    Attributes:
        records: by request, in the order in which they ended.
        tick_times: when each decode step ended; index 0 is the start.
        seconds: simulated time.
        steps: steps with work in them.
        memory: mean share of the KV memory in use over decode steps.
        evictions: in all.
    """

    records: list[Record]
    tick_times: list[float]
    seconds: float
    steps: int
    memory: float
    evictions: int

    @property
    def decode_steps(self) -> int:
        """Steps in which someone decoded."""
        return len(self.tick_times) - 1


Watch = Callable[[Runtime, SimEngine], None]


def run(
    source: Source,
    capabilities: Capabilities,
    policy: Policy,
    latency: LatencyModel,
    *,
    enforce_caps: bool = True,
    watch: Watch | None = None,
) -> Run:
    """Simulate until the source has no more jobs and all have ended.

    Args:
        enforce_caps: end requests at their cap, as servers do.
        watch: called after every step.
    """
    clock = VirtualClock()
    engine = SimEngine(capabilities, latency, clock)
    scheduler = Scheduler(capabilities, policy, enforce_caps=enforce_caps)
    runtime = Runtime(scheduler, engine, clock)
    jobs: dict[RequestId, Job] = {}
    records: list[Record] = []
    used = steps = 0
    while True:
        for job in source.due(clock.now):
            jobs[job.id] = job
            _add(runtime, job)
        ticks = engine.ticks
        output = runtime.step()
        if output is None:
            arrival = source.next_arrival()
            if arrival is None:
                break
            clock.advance_to(arrival)
            continue
        steps += 1
        if engine.ticks != ticks:
            used += scheduler.step_blocks
        for ended in output.ended:
            record = Record(jobs.pop(ended.id), ended, clock.now)
            records.append(record)
            source.ended(record, clock.now)
        if watch is not None:
            watch(runtime, engine)
    for record in records:
        record.stretches = engine.stretches.pop(record.job.id)
        times = token_times(record, engine.tick_times)
        record.latency = latency_of(Timeline(record.job.arrival, times, len(times)))
    share = used / engine.ticks / capabilities.kv_blocks if engine.ticks else 0.0
    return Run(records, engine.tick_times, clock.now, steps, share, scheduler.evictions)


def _add(runtime: Runtime, job: Job) -> None:
    request = Request(
        job.id,
        job.prompt,
        job.cap,
        job.arrival,
        slo=job.slo,
        slo_class=job.slo_class,
        priority=job.priority,
        on_miss=job.on_miss,
        prefix=job.prefix,
    )
    runtime.add(request, Work(range(job.prompt), trace_length=job.output))


def token_times(record: Record, tick_times: list[float]) -> list[float]:
    """When each output token of a request came, in seconds, in order."""
    times: list[float] = []
    for stretch in record.stretches:
        if stretch.sampled_at is not None:
            times.append(stretch.sampled_at)
        times.extend(tick_times[stretch.first : stretch.last + 1])
    return times
