"""Compare the simulator with the live engine, as README.md says; see there.

python benchmarks/fidelity/run.py --rounds 3
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import cyclopts
import msgspec

from penstock.bench.goodput import summarize
from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.engine import Engine
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.fit import Sample
from penstock.core.types import SLO, Capabilities
from penstock.engine import NativeEngine
from penstock.sim.outcome import attempt_of
from penstock.sim.profiling.steps import samples_of
from penstock.sim.recording import StepRecord
from penstock.sim.run import Record, Source
from penstock.sim.run import run as simulate

sys.path.insert(0, str(Path(__file__).parent))
import cells
import report
from beside import Beside, Course, Learned, Slice, learn
from live import LiveRun, OtherWork, live

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 90  # slices
GAP_STEPS = 13  # as in benchmarks/past_future_live
TYPICAL = StepLoad(decoding=16, context=16 * 100, longest=100)


def main(
    *,
    rounds: int = 3,
    out: Path = ROOT / "benchmarks" / "results" / "fidelity",
    model: str = "demo",
    threads: int = 1,
) -> None:
    """Measure, predict, and write both down; rounds add to those of an earlier call.

    Args:
        rounds: each measures every cell once, and learns step times before and after each.
        out: where results go.
        model: what the live engine runs.
        threads: CPU threads of the engine.
    """
    cells.check()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rounds.jsonl"
    for _ in range(rounds):
        found = one_round(model, threads)
        with path.open("ab") as file:
            file.write(msgspec.json.encode(found) + b"\n")
        report.write(path, out)


def one_round(model: str, threads: int) -> dict[str, object]:
    """Measure and predict every cell."""

    def engine(kv_tokens: int) -> Engine:
        return NativeEngine.load(
            model, kv_tokens=kv_tokens, block_size=cells.BLOCK, max_batch=cells.MAX_BATCH,
            max_step_tokens=cells.STEP_TOKENS, prefix_cache=False, threads=threads,
        )  # fmt: skip

    began = time.time()
    beside = Beside(lambda: engine(cells.CALIBRATION_KV))
    for _ in range(WARM_UP):
        beside.slice(0.0)
    measured = [
        measure(load, preset, engine(load.kv_tokens), beside)
        for load in cells.LOADS
        for preset in cells.PRESETS
    ]
    learned = learn([one.slices for one in measured])
    print(f"{learned.model}\nerror {learned.held_out:.1%} on held-out slices", flush=True)
    rows = [compare(one, learned, index) for index, one in enumerate(measured)]
    return {
        "when": round(began),
        "command": " ".join(["python", *sys.argv]),
        "commit": revision(ROOT),
        **machine(),
        "model": model,
        "threads": threads,
        "profile": asdict(learned.model),
        "error_held_out": learned.held_out,
        "cells": rows,
    }


def slo_of(load: cells.Load, step: float) -> SLO:
    """Bounds, from the seconds of a typical decode step."""
    return SLO(ttft=load.ttft_steps * step, gap=GAP_STEPS * step)


@dataclass(frozen=True)
class Measured:
    """A cell, live; ``others`` is the CPU that other processes took meanwhile, in cores."""

    load: cells.Load
    preset: str
    run: LiveRun
    slices: list[Slice]
    capabilities: Capabilities
    others: float


def measure(load: cells.Load, preset: str, engine: Engine, beside: Beside) -> Measured:
    """One scheduler on one load, live."""
    workload = load.workload()
    policy, prompts = cells.policy(preset), cells.prompts_of(workload)
    meter = OtherWork()
    done = live(load.source(workload, SLO()), engine, policy, prompts, beside)
    others = meter.cores()
    engine.close()
    print(
        f"{load.name}, {preset}: {done.seconds:.1f} s; others took {others:.2f} cores", flush=True
    )
    return Measured(load, preset, done, beside.slices, engine.capabilities, others)


def compare(one: Measured, learned: Learned, index: int) -> dict[str, object]:
    """Predict a cell, on the machine's course and at its mean speed, and put all side by side."""
    load, done = one.load, one.run
    mean = learned.at_mean_speed(index)
    slo = slo_of(load, mean.seconds(TYPICAL))

    def source() -> Source:
        return load.source(load.workload(), slo)

    course = Course(learned, index, source())
    made = simulate(course, one.capabilities, cells.policy(one.preset), course)
    steady = simulate(source(), one.capabilities, cells.policy(one.preset), mean)
    bounded = [record._replace(job=record.job._replace(slo=slo)) for record in done.records]
    slowness = learned.courses[index][1]
    row: dict[str, object] = {
        "load": load.name,
        "preset": one.preset,
        "live": numbers(bounded, done.seconds, done.evictions),
        "sim": numbers(made.records, made.seconds, made.evictions),
        "sim_steady": numbers(steady.records, steady.seconds, steady.evictions),
        "slowness": [float(slowness.min()), float(slowness.max())],
        "slo": {"ttft": slo.ttft, "gap": slo.gap},
        "steps": [len(done.steps), made.steps],
        "time_error": time_error(mean, samples_of(done.steps)),
        "host_share": host_share(done.steps),
        "others": round(one.others, 3),
    }
    print(report.line(row), flush=True)
    return row


def time_error(latency: LatencyModel, samples: list[Sample]) -> float:
    """Signed error of the sum of all step times."""
    return sum(latency.seconds(s.load) for s in samples) / sum(s.seconds for s in samples) - 1


def numbers(records: list[Record], seconds: float, evictions: int) -> dict[str, float]:
    """What is compared, by the definitions of the load generator."""
    summary = summarize(map(attempt_of, records), 0.0, seconds)
    latencies = summary.percentiles
    finished = summary.ends["completed"]
    return {
        "goodput": summary.goodput_output_tps,
        "throughput": summary.throughput_output_tps,
        "ttft_p50": latencies["ttft"]["p50"],
        "ttft_p99": latencies["ttft"]["p99"],
        "gap_p99": latencies["gap"]["p99"],
        "tpot_p50": latencies["tpot"]["p50"],
        "attainment": summary.attainment or 0.0,
        "evicted": evictions / finished,
        "seconds": seconds,
    }


def host_share(steps: list[StepRecord]) -> float:
    """Share of time that the host takes between the engine's steps."""
    pairs = [(step.host, step.seconds) for step in steps if step.host is not None]
    return sum(host for host, _ in pairs) / sum(host + seconds for host, seconds in pairs)


if __name__ == "__main__":
    cyclopts.run(main)
