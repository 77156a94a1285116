"""One measurement from end to end: trial request, warm-up, load, server's numbers, summary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

from penstock.bench import scrape
from penstock.bench.client import Target
from penstock.bench.drive import Rules, Run, check
from penstock.bench.goodput import Attempt, summarize
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result, ServerNumbers, percentile
from penstock.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Load:
    """How hard to press.

    Attributes:
        clients: closed loop with so many clients; None is open loop, by the workload's times.
        speed: open loop: times are divided by it.
        duration: seconds after which the run is cut; None runs until the workload is done.
        warmup: seconds from the start that are not measured.
        completed: closed loop with a duration: the run is cut earlier, when so many attempts have
            run to their end.
    """

    clients: int | None = None
    speed: float = 1.0
    duration: float | None = None
    warmup: float = 0.0
    completed: int | None = None

    def __post_init__(self) -> None:
        if self.clients is not None and self.clients < 1:
            msg = f"clients is {self.clients}; it must be at least 1"
            raise ValueError(msg)
        for name in ("speed", "duration"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                msg = f"{name} is {value}; it must be above 0"
                raise ValueError(msg)
        if not 0 <= self.warmup < float("inf") or (
            self.duration is not None and self.warmup >= self.duration
        ):
            msg = f"warmup is {self.warmup} s; it must be at least 0 and below the duration"
            raise ValueError(msg)
        if self.completed is not None and not (
            self.completed >= 1 and self.clients is not None and self.duration is not None
        ):
            msg = (
                f"completed is {self.completed}; it must be at least 1, with clients and a duration"
            )
            raise ValueError(msg)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What to measure.

    Attributes:
        settings: copied into the result, for the record.
        on_attempt: called after each attempt, for progress.
    """

    target: Target
    workload: Workload
    rules: Rules
    load: Load
    prompts: Prompts
    settings: Mapping[str, object] = field(default_factory=dict)
    on_attempt: Callable[[Attempt], None] = lambda _: None


async def measure(job: Measurement) -> Result:
    """Run a measurement.

    Raises:
        HookError: the endpoint does not keep to the workload's lengths, or does not answer.
        ValueError: the run was shorter than its warm-up.
    """
    text = job.rules.text_prompts or job.target.api == "chat"
    trial = "Hello there" if text else [job.prompts.low] * 4
    await check(job.target, job.rules, trial)
    run = Run(job.target, job.workload, job.prompts, job.rules, job.on_attempt)
    async with scrape.watching(job.target) as seen:
        cpu = time.process_time()
        if job.load.clients is not None:
            await run.closed_loop(job.load.clients, job.load.duration, job.load.completed)
        else:
            await run.open_loop(job.load.speed, job.load.duration)
        stop = perf_counter()
        cpu = time.process_time() - cpu
    start = run.start + job.load.warmup
    if start >= stop:
        msg = f"the run took {stop - run.start:.1f} s, not longer than its warm-up"
        raise ValueError(msg)
    return Result(
        source=job.workload.source,
        lengths=job.rules.lengths,
        classes=job.workload.classes,
        settings=job.settings,
        notes=job.workload.notes,
        window=(start - run.start, stop - run.start),
        summary=summarize(run.attempts, start, stop),
        server=_numbers(seen, run.start, start, stop),
        attempts=run.attempts,
        start=run.start,
        client_cpu=cpu / (stop - run.start),
        send_lag_p99=percentile(run.lags, 99),
        gave_up=run.gave_up,
    )


def run(job: Measurement) -> Result:
    """Run a measurement in an event loop of its own; see :func:`measure`."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(job))


def _numbers(seen: scrape.ServerSide, zero: float, start: float, stop: float) -> ServerNumbers:
    series = tuple(
        (round(t - zero, 3), v[scrape.KV_USE]) for t, v in seen.samples if scrape.KV_USE in v
    )
    return ServerNumbers(
        evictions=seen.evictions(start, stop),
        kv_use_mean=seen.mean(scrape.KV_USE, start, stop),
        running_mean=seen.mean(scrape.RUNNING, start, stop),
        kv_series=series,
    )
