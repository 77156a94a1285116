"""How honest is the predicted wait, from which Retry-After comes?

Each request's predicted wait on arrival, by the same code that the server's gate asks, against
the time until it was really admitted, on a virtual clock.  Nobody is refused, so every prediction
can be compared.  Loads: Poisson arrivals at a share of what the machine sustains, and bursts.

Run: ``python benchmarks/retry_after.py [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.policies import presets
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities
from penstock.sim import profiles
from penstock.sim.run import Job, Record, Seen, run
from penstock.sim.sources import OpenLoop

ROOT = Path(__file__).resolve().parents[1]
PROFILE, KV_TOKENS = "llama-3.1-8b/h100", 120_000
LEAST = 1.0
"""Waits below this many seconds are answered with the smallest Retry-After there is."""


class Watched:
    """An open loop that asks for the predicted wait of each request as it comes."""

    def __init__(self, jobs: list[Job]) -> None:
        self._loop = OpenLoop(jobs)
        self.scheduler: Scheduler | None = None
        self.predicted: dict[str, float] = {}
        self.admitted: dict[str, float] = {}

    def due(self, now: float) -> Iterable[Job]:
        """Jobs that have come by now, one after the other."""
        for job in self._loop.due(now):
            if self.scheduler is not None:
                self.predicted[job.id] = self.scheduler.stats(now).load.predicted_wait
            yield job

    def next_arrival(self) -> float | None:
        """See :class:`OpenLoop`."""
        return self._loop.next_arrival()

    def ended(self, record: Record, now: float) -> None:
        """See :class:`OpenLoop`."""

    def watch(self, seen: Seen) -> None:
        """Note who was admitted."""
        self.scheduler = seen.scheduler
        for start in seen.plan.starts:
            self.admitted.setdefault(start.id, seen.began)


def jobs(rate: float, burst: int, count: int, seed: int) -> list[Job]:
    """Log-normal lengths, in bursts of ``burst`` at a time, ``rate`` per second in all."""
    rng = np.random.default_rng(seed)
    times = np.repeat(np.cumsum(rng.exponential(burst / rate, -(-count // burst))), burst)[:count]
    prompt = np.minimum(rng.lognormal(np.log(800), 0.9, count), 8000).astype(int) + 1
    output = np.minimum(rng.lognormal(np.log(250), 0.8, count), 2000).astype(int) + 1
    rows = zip(times.tolist(), prompt.tolist(), output.tolist(), strict=True)
    return [Job(str(i), at, p, o, 2000) for i, (at, p, o) in enumerate(rows)]


def measure(preset: str, rate: float, burst: int, seed: int) -> dict[str, float | int | str]:
    """One load under one preset."""
    source = Watched(jobs(rate, burst, 6_000, seed))
    machine_ = Capabilities(KV_TOKENS // 16, 16, 256, 2048, KV_TOKENS)
    policy = presets.build(preset, seed=seed)
    done = run(source, machine_, policy, profiles.load(PROFILE), watch=source.watch)
    arrived = {record.job.id: record.job.arrival for record in done.records}
    pairs = np.array(
        [
            (predicted, source.admitted[name] - arrived[name])
            for name, predicted in source.predicted.items()
            if source.admitted[name] - arrived[name] >= LEAST
        ]
    ).reshape(-1, 2)
    row: dict[str, float | int | str] = {
        "preset": preset, "rate": rate, "burst": burst, "seed": seed, "waited": len(pairs),
    }  # fmt: skip
    if len(pairs):
        predicted, actual = pairs.T
        ratio = predicted / actual
        row |= {
            "median_wait_s": round(float(np.median(actual)), 2),
            "ratio_p10": round(float(np.quantile(ratio, 0.1)), 3),
            "ratio_median": round(float(np.median(ratio)), 3),
            "ratio_p90": round(float(np.quantile(ratio, 0.9)), 3),
            "within_a_third": round(float(np.mean((ratio > 2 / 3) & (ratio < 1.5))), 3),
        }
    return row


def main() -> None:
    """All loads and presets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for preset in ("past-future", "vllm", "tgi"):
        for rate, burst in ((4.0, 1), (6.0, 1), (9.0, 1), (4.0, 100), (4.0, 400)):
            row = measure(preset, rate, burst, seed=1)
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.json:
        report = {"commit": revision(ROOT), "machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
