"""What came of a simulated run, as plain data: what sweeps keep and reports show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import msgspec

from penstock.bench.goodput import End, Summary, summarize
from penstock.bench.workload import Workload
from penstock.sim.outcome import attempt_of
from penstock.sim.run import Run

# A window leaves its start out, and where prefill takes no time a request can end at 0.
_JUST_BEFORE = math.nextafter(0.0, -1.0)


class ClassResult(msgspec.Struct, frozen=True):
    """Attempts of one SLO class."""

    attempts: int
    met: int
    attainment: float | None
    goodput_output_tps: float
    broken: dict[str, int]


class RunResult(msgspec.Struct, frozen=True):
    """What came of a run; the terms are those of ``docs/bench.md``.

    Attributes:
        finished: requests that completed, at the first try or a later one.
        goodput_output_tps, goodput_total_tps, goodput_rps, throughput_output_tps: 0 if the run
            took no time.
        evicted_ratio: evictions over finished requests.
        prefix_hits: prompt tokens found in the prefix cache, over all prompt tokens.
        memory: mean share of the KV memory in use over decode steps.
        seconds: simulated; ``wall_s`` is what it took to simulate.
        latency: by name (ttft, tpot, gap, e2e): mean, p50, p90, p99 of finished requests.
        notes: what was left out or changed on the way.
    """

    attempts: int
    finished: int
    attainment: float | None
    goodput_output_tps: float
    goodput_total_tps: float
    goodput_rps: float
    throughput_output_tps: float
    memory: float
    evictions: int
    evicted_ratio: float | None
    prefix_hits: float
    decode_steps: int
    steps: int
    seconds: float
    wall_s: float
    ends: dict[str, int]
    latency: dict[str, dict[str, float]]
    classes: dict[str, ClassResult]
    notes: tuple[str, ...] = ()
    swapped_tokens: int = 0


def result_of(runs: Sequence[Run], workload: Workload, wall_s: float) -> RunResult:
    """Sum instances up as one system, over the whole of their time."""
    records = [record for each in runs for record in each.records]
    seconds = max(each.seconds for each in runs)
    attempts = [attempt_of(record) for record in records]
    # There is no rate over no time: over an endless one it is 0.
    summary = summarize(attempts, _JUST_BEFORE, seconds or math.inf)
    finished = len({each.request for each in attempts if each.end is End.COMPLETED})
    evictions = sum(each.evictions for each in runs)
    steps = sum(each.decode_steps for each in runs)
    held = sum(each.memory * each.decode_steps for each in runs)
    notes = workload.notes
    if workload.hash_ids is not None and not any(each.cached_tokens for each in runs):
        notes = (*notes, "prefixes that the trace's requests share are computed anew each time")
    prompts = sum(record.job.prompt for record in records)
    return RunResult(
        attempts=summary.attempts,
        finished=finished,
        attainment=summary.attainment,
        goodput_output_tps=summary.goodput_output_tps,
        goodput_total_tps=summary.goodput_total_tps,
        goodput_rps=summary.goodput_rps,
        throughput_output_tps=summary.throughput_output_tps,
        memory=held / steps if steps else 0.0,
        evictions=evictions,
        evicted_ratio=evictions / finished if finished else None,
        prefix_hits=sum(each.cached_tokens for each in runs) / prompts if prompts else 0.0,
        decode_steps=steps,
        steps=sum(each.steps for each in runs),
        seconds=seconds,
        wall_s=wall_s,
        ends=dict(summary.ends),
        latency={name: dict(row) for name, row in summary.percentiles.items()},
        classes=_classes(summary),
        notes=notes,
        swapped_tokens=sum(each.swapped_tokens for each in runs),
    )


def _classes(summary: Summary) -> dict[str, ClassResult]:
    return {name: ClassResult(**asdict(part)) for name, part in summary.classes.items()}
