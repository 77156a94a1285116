"""What share of a native step the scheduler takes: 16 requests at a time, on this machine.

A random Llama of about 30 million parameters, prompts of 32 to 256 and outputs of 64 to 128 tokens.
As each request ends the next one comes, so admission passes are part of it.

Run: ``python benchmarks/planning_share.py [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from random import Random

from transformers import LlamaConfig

from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.engine import Work
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.sampling import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Request
from penstock.engine import NativeEngine
from penstock.engine.loading import load_random

ROOT = Path(__file__).resolve().parents[1]
CONCURRENT, REQUESTS = 16, 160
CONFIG = LlamaConfig(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1408,
    vocab_size=16_000,
)


def measure(preset: str) -> dict[str, float | str]:
    """Serve the requests and add up both times."""
    engine = NativeEngine(
        load_random(CONFIG, dtype="bfloat16"), Capabilities(512, 16, CONCURRENT, 512, 8_192)
    )
    scheduler = Scheduler(engine.capabilities, presets.build(preset))
    runtime = Runtime(scheduler, engine, time.perf_counter)
    rng = Random(1)
    added = open_ = 0
    steps: list[tuple[float, float]] = []
    while added < REQUESTS or open_:
        while open_ < CONCURRENT and added < REQUESTS:
            prompt = [rng.randrange(10, 16_000) for _ in range(rng.randint(32, 256))]
            request = Request(str(added), len(prompt), rng.randint(64, 128), time.perf_counter())
            sampling = SamplingParams(temperature=0.0, ignore_eos=True)
            runtime.add(request, Work(prompt, sampling))
            added += 1
            open_ += 1
        step = runtime.step()
        assert step is not None
        open_ -= len(step.ended)
        steps.append((step.planning, step.seconds))
    planning, seconds = (sum(column) for column in zip(*steps, strict=True))
    return {
        "preset": preset,
        "steps": len(steps),
        "step_ms_median": round(1e3 * statistics.median(s for _, s in steps), 2),
        "planning_us_median": round(1e6 * statistics.median(p for p, _ in steps), 1),
        "planning_share": round(planning / (planning + seconds), 5),
    }


def main() -> None:
    """All presets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for preset in ("past-future", "vllm", "tgi"):
        row = measure(preset)
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.json:
        report = {"commit": revision(ROOT), "machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
