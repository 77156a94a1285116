"""One cell of the study: a preset on a model, a load and a number of clients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from penstock.bench.fitted import fitted
from penstock.bench.goodput import Attempt, End, misses, summarize
from penstock.bench.workload import Lengths, Workload, synthetic
from penstock.core.policies import presets
from penstock.core.types import SLO, Capabilities, Ended, FinishReason, OnMiss
from penstock.sim import profiles
from penstock.sim.outcome import attempt_of
from penstock.sim.run import Job, Record, Run, run
from penstock.sim.sources import ClosedLoop

PAST = 1000
HORIZON = 12 * 3600.0  # simulated seconds after which no request is sent any more
PREFILL = 2048
ENDLESS = 10**9


@dataclass(frozen=True)
class Machine:
    """A model on its GPUs, with the bounds and the loads that it gets."""

    name: str
    profile: str
    kv_tokens: int
    clients: tuple[int, ...]
    sla: SLO
    given_up: SLO


@dataclass(frozen=True)
class Load:
    """Lengths, and the cap that policies are told."""

    name: str
    lengths: tuple[str, str] | None
    requests: int
    cap: int

    def draw(self, count: int, seed: int) -> Workload:
        """So many requests."""
        if self.lengths is None:
            return fitted("sharegpt-o1", count, seed)
        prompt, output = map(Lengths.parse, self.lengths)
        return synthetic(prompt, output, count, seed)


@dataclass(frozen=True)
class Series:
    """A curve: a preset and what else decides."""

    name: str
    preset: str
    past: int = 0
    cap: int | None = None
    late_given_up: bool = False


SMALL = (10, 20, 30, 40, 60, 80, 100)
SLA, GIVEN_UP = SLO(ttft=10, gap=1.5), SLO(ttft=8, gap=1.49)
MACHINES = (
    Machine("Llama-2-7B", "llama-2-7b/a100-80g", 120_000, SMALL, SLA, GIVEN_UP),
    Machine("Llama-2-13B", "llama-2-13b/a100-80g", 64_000, SMALL, SLA, GIVEN_UP),
    Machine(
        "Llama-2-70B", "llama-2-70b/a100-80g-x4", 550_000, (100, 200, 300, 400, 500),
        SLO(ttft=15, gap=5), SLO(ttft=10, gap=4.9),
    ),
)  # fmt: skip
LOADS = (
    Load("ShareGPT-o1", None, 1900, 12_000),
    Load("Distribution-1", ("uniform:32-4096", "uniform:2048-4096"), 500, 4096),
    Load("Distribution-2", ("uniform:3000-5000", "uniform:3000-5000"), 500, 5000),
    Load("Distribution-3", ("uniform:2048-4096", "uniform:32-4096"), 500, 4096),
)
SERIES = (
    Series("tgi", "tgi"),
    Series("vllm", "vllm"),
    Series("past-future", "past-future", past=PAST),
    Series("oracle", "oracle"),
    Series("past-future, cold", "past-future"),
    Series("past-future-artifact", "past-future-artifact"),
    Series("tgi, cap 12,000", "tgi", cap=12_000),
    Series("past-future, late given up", "past-future", past=PAST, late_given_up=True),
    Series("vllm, late given up", "vllm", late_given_up=True),
    Series("past-future-adaptive", "past-future-adaptive", past=PAST),
)
MAIN = tuple(series.name for series in SERIES[:4])


@dataclass(frozen=True)
class Cell:
    """One simulated run, by the names of what it is made of."""

    machine: str
    load: str
    clients: int
    series: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "/".join(map(str, asdict(self).values()))


def cells(seeds: Sequence[int], *, main: bool = False) -> Iterator[Cell]:
    """All of them, those of the paper's curves first; with ``main`` only those."""
    for group in (SERIES[: len(MAIN)], () if main else SERIES[len(MAIN) :]):
        for seed in seeds:
            for gpu in MACHINES:
                for load in LOADS:
                    for clients in gpu.clients:
                        for series in group:
                            yield Cell(gpu.name, load.name, clients, series.name, seed)


def simulate(cell: Cell) -> dict[str, Any]:
    """Run a cell; the numbers that are kept."""
    began = time.perf_counter()
    gpu, load, series = (
        _find(MACHINES, cell.machine),
        _find(LOADS, cell.load),
        series_of(cell.series),
    )
    workload = load.draw(load.requests, cell.seed)
    policy = presets.build(series.preset, seed=cell.seed)
    for length in _past(load, series, cell.seed):
        policy.admit.observe(Ended("earlier", FinishReason.STOP, length, 0))
    capabilities = Capabilities(
        kv_blocks=gpu.kv_tokens,
        block_size=1,
        max_batch=1000,
        max_step_tokens=PREFILL,
        max_request_tokens=gpu.kv_tokens,
    )
    source = ClosedLoop(
        _jobs(workload, series.cap or load.cap, _promise(gpu, series)),
        cell.clients,
        retries=ENDLESS,
        met=lambda record: _judged(record, gpu.sla).met,
        until=HORIZON,
    )
    done = run(source, capabilities, policy, profiles.load(gpu.profile))
    numbers = _numbers(done, gpu, load)
    return {"key": cell.key, **asdict(cell), **numbers, "wall_s": time.perf_counter() - began}


def _past(load: Load, series: Series, seed: int) -> list[int]:
    """Output lengths of requests that ended before; others than those that are measured."""
    if not series.past:
        return []
    output = load.draw(series.past, seed + 1_000_000).output
    assert output is not None
    return [int(length) for length in output]


def _promise(gpu: Machine, series: Series) -> SLO:
    return gpu.given_up if series.late_given_up else replace(gpu.given_up, gap=None)


def _jobs(workload: Workload, cap: int, promise: SLO) -> list[Job]:
    assert workload.output is not None
    rows = zip(workload.prompt.tolist(), workload.output.tolist(), strict=True)
    return [
        Job(str(i), 0.0, prompt, output, cap, promise, on_miss=OnMiss.EXPIRE, request=i)
        for i, (prompt, output) in enumerate(rows)
    ]


def _judged(record: Record, sla: SLO) -> Attempt:
    """An attempt by the client's bounds, which are wider than those it is given up at."""
    attempt = attempt_of(record)
    broken = misses(record.latency, sla) if attempt.end is End.COMPLETED else ()
    return replace(attempt, broken=broken)


def _numbers(done: Run, gpu: Machine, load: Load) -> dict[str, Any]:
    attempts = [_judged(record, gpu.sla) for record in done.records]
    summary = summarize(attempts, 0.0, done.seconds)
    late = summary.percentiles
    return {
        "goodput": summary.goodput_total_tps,
        "goodput_output": summary.goodput_output_tps,
        "good": summary.requests_met,
        "requests": load.requests,
        "attempts": summary.attempts,
        "given_up": summary.ends.get("expired", 0),
        "late_ttft": sum("ttft" in attempt.broken for attempt in attempts),
        "late_gap": sum("gap" in attempt.broken for attempt in attempts),
        "evictions": done.evictions,
        "memory": done.memory,
        "seconds": done.seconds,
        "ttft_p99": late["ttft"]["p99"] if "ttft" in late else None,
        "gap_p99": late["gap"]["p99"] if "gap" in late else None,
    }


def _find(table: Sequence[Any], name: str) -> Any:
    return next(item for item in table if item.name == name)


def series_of(name: str) -> Series:
    """By its name."""
    found: Series = _find(SERIES, name)
    return found
