"""Compare the simulator with the live engine, as README.md says; see there.

python benchmarks/fidelity/run.py --rounds 3
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cyclopts
import msgspec

from penstock.bench.goodput import summarize
from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.engine import Engine
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.fit import Sample, fit_affine, mape
from penstock.core.types import SLO
from penstock.engine import NativeEngine
from penstock.sim.outcome import attempt_of
from penstock.sim.profiling.steps import samples_of, split
from penstock.sim.recording import StepRecord
from penstock.sim.run import Record
from penstock.sim.run import run as simulate
from penstock.sim.sources import ClosedLoop

sys.path.insert(0, str(Path(__file__).parent))
import cells
import report
from live import live

ROOT = Path(__file__).resolve().parents[2]
TTFT_STEPS, GAP_STEPS = 200, 13  # as in benchmarks/past_future_live
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
        rounds: each learns the step times anew, and then measures every cell once.
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
    """Learn step times, then measure and predict every cell."""

    def engine(kv_tokens: int) -> Engine:
        return NativeEngine.load(
            model, kv_tokens=kv_tokens, block_size=cells.BLOCK, max_batch=cells.MAX_BATCH,
            max_step_tokens=cells.STEP_TOKENS, prefix_cache=False, threads=threads,
        )  # fmt: skip

    began = time.time()
    steps = calibrate(lambda: engine(cells.CALIBRATION_KV))
    fitted, held_out = split(samples_of(steps))
    latency = fit_affine(fitted)
    step = latency.seconds(TYPICAL)
    slo = SLO(ttft=TTFT_STEPS * step, gap=GAP_STEPS * step)
    print(f"step times: {latency}\nerror {mape(latency, held_out):.1%} on held-out steps")
    rows = [
        cell(load, preset, engine(load.kv_tokens), latency, slo)
        for load in cells.LOADS
        for preset in cells.PRESETS
    ]
    return {
        "when": round(began),
        "command": " ".join(["python", *sys.argv]),
        "commit": revision(ROOT),
        **machine(),
        "model": model,
        "threads": threads,
        "profile": asdict(latency),
        "steps": len(steps),
        "error_fitted": mape(latency, fitted),
        "error_held_out": mape(latency, held_out),
        "host_share": host_share(steps),
        "slo": {"ttft": slo.ttft, "gap": slo.gap},
        "load_average": os.getloadavg()[0],
        "cells": rows,
    }


def calibrate(engine: Callable[[], Engine]) -> list[StepRecord]:
    """Steps of the other load, after a first loop that is thrown away."""
    loops = cells.calibration()
    steps: list[StepRecord] = []
    for index, (workload, clients) in enumerate([loops[2], *loops]):
        source = ClosedLoop(cells.jobs(workload, 300, SLO()), clients)
        fresh = engine()
        done = live(source, fresh, cells.policy("vllm"), cells.prompts_of(workload))
        fresh.close()
        if index:
            steps += done.steps
    return steps


def cell(
    load: cells.Load, preset: str, engine: Engine, latency: LatencyModel, slo: SLO
) -> dict[str, object]:
    """Measure and predict one scheduler on one load."""
    workload = load.workload()
    measured = live(
        load.source(workload, slo), engine, cells.policy(preset), cells.prompts_of(workload)
    )
    engine.close()
    predicted = simulate(
        load.source(workload, slo), engine.capabilities, cells.policy(preset), latency
    )
    seen = numbers(measured.records, measured.seconds, measured.evictions)
    said = numbers(predicted.records, predicted.seconds, predicted.evictions)
    samples = samples_of(measured.steps)
    row: dict[str, object] = {
        "load": load.name,
        "preset": preset,
        "live": seen,
        "sim": said,
        "steps": [len(measured.steps), predicted.steps],
        "step_error": mape(latency, samples),
        "time_error": time_error(latency, samples),
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


def profile_of(data: dict[str, float]) -> Affine:
    """A round's profile, to predict with it again."""
    return Affine(**data)


if __name__ == "__main__":
    cyclopts.run(main)
