"""Planning cost per step: what the scheduler takes to make one plan.

Two situations, each with requests that decode and requests that wait:

* nothing changed: the queue's head stays deferred and nobody comes or goes;
* churn: in every step one request in 256 ends, at least one, and another comes, so that the policy
  decides anew.  Lengths are geometric, memory binds at about so many running requests, and the past
  that the policy knows is of such requests alone.

Each is measured in several rounds, of which the medians are printed.

Run: ``python benchmarks/planning_cost.py [--json FILE]``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from pathlib import Path

from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.policies import presets
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Request, StepPlan, StepResult

SIZES = ((40, 100), (256, 1_000), (4_096, 100_000))
STEPS = 2_000
ROUNDS = 5
ROOT = Path(__file__).resolve().parents[1]
PROMPT, CAP, BLOCK = 64, 4_000, 16


def _scheduler(preset: str, running: int, waiting: int) -> Scheduler:
    """A scheduler with so many requests decoding and waiting, of which none can start.

    Memory binds as under heavy load.  Past-Future forecasts that the small head of the queue
    does not fit, once those who run fill what it does not keep in reserve; the policies that look
    at the present need a large head for that.
    """
    held = {"tgi": PROMPT + CAP, "vllm": PROMPT + STEPS + 8, "past-future": 1.04 * (PROMPT + CAP)}[
        preset
    ]
    capabilities = Capabilities(
        kv_blocks=int(running * held) // BLOCK,
        block_size=BLOCK,
        max_batch=running + 64,
        max_step_tokens=max(8_192, 2 * running),
        max_request_tokens=int(running * held),
    )
    scheduler = Scheduler(capabilities, presets.build(preset, seed=1))
    for index in range(running):
        scheduler.add(Request(f"run-{index}", PROMPT, CAP, 0.0))
        if index % 64 == 63 or index == running - 1:
            _confirm(scheduler, _plan(scheduler))
    prompt = PROMPT if preset == "past-future" else int(running * held) - CAP
    for index in range(waiting):
        scheduler.add(Request(f"wait-{index}", prompt, CAP, 1.0))
    return scheduler


class _Churn:
    """A scheduler of which some requests end in every step, and as many come."""

    def __init__(self, preset: str, running: int, waiting: int) -> None:
        self._ends = max(1, running // 256)
        self._random = random.Random(1)
        # What a request holds on average, at a random moment of its life.
        held = PROMPT + (CAP if preset == "tgi" else running // self._ends)
        capabilities = Capabilities(
            kv_blocks=-(-running * held // BLOCK),
            block_size=BLOCK,
            max_batch=2 * running,
            max_step_tokens=max(8_192, 2 * running),
            max_request_tokens=PROMPT + CAP,
        )
        self.scheduler = Scheduler(capabilities, presets.build(preset, seed=1))
        self._names = itertools.count()
        self.come(waiting + running)
        while self.scheduler.stats(2.0).waiting > waiting:
            self.end(_plan(self.scheduler))

    def come(self, count: int) -> None:
        """So many more wait."""
        for _ in range(count):
            self.scheduler.add(Request(f"r{next(self._names)}", PROMPT, CAP, 1.0))

    def end(self, plan: StepPlan) -> int:
        """End some requests with this plan; returns how many did."""
        count = min(self._ends, len(plan.decode))
        return _confirm(self.scheduler, plan, tuple(self._random.sample(plan.decode, count)))


def _plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan(2.0)
    assert plan is not None
    return plan


def _confirm(scheduler: Scheduler, plan: StepPlan, stopped: tuple[str, ...] = ()) -> int:
    ends = dict.fromkeys(stopped, ())
    scheduler.confirm(StepResult(plan.number, 0.0, {}, ends))
    return len(scheduler.take_ended())


def measure(preset: str, running: int, waiting: int, *, churn: bool) -> dict[str, float]:
    """Seconds per plan (and confirmation) over many steps, in microseconds."""
    steps = STEPS if running < 4_096 else STEPS // 4
    there = _Churn(preset, running, waiting) if churn else None
    scheduler = there.scheduler if there else _scheduler(preset, running, waiting)
    plans, confirms, decoding = [], [], []
    # The window of past lengths holds 1,000, so that many must have ended.
    for step in range(-1_000 if churn else 0, steps):
        began = time.perf_counter()
        plan = _plan(scheduler)
        planned = time.perf_counter()
        if there is None:
            _confirm(scheduler, plan)
        else:
            there.come(there.end(plan))
        if step >= 0:
            confirms.append((time.perf_counter() - planned) * 1e6)
            plans.append((planned - began) * 1e6)
            decoding.append(len(plan.decode))
    cuts = statistics.quantiles(plans, n=100)
    return {
        "decoding_mean": round(statistics.mean(decoding)),
        "plan_us_median": round(statistics.median(plans), 1),
        "plan_us_p99": round(cuts[98], 1),
        "confirm_us_median": round(statistics.median(confirms), 1),
    }


def _median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each number, and between what the rounds' p99 lay: a virtual machine has bad seconds."""
    row = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    tails = [each["plan_us_p99"] for each in rounds]
    return {**row, "plan_us_p99_least": min(tails), "plan_us_p99_most": max(tails)}


def main() -> None:
    """Measure every preset at every size, some rounds over, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = [
        (preset, running, waiting, churn)
        for running, waiting in SIZES
        for preset in ("vllm", "tgi", "past-future")
        for churn in (False, True)
    ]
    measured: dict[tuple[str, int, int, bool], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for case in cases:
            preset, running, waiting, churn = case
            found = measure(preset, running, waiting, churn=churn)
            measured.setdefault(case, []).append(found)
    rows = [
        {
            "preset": preset,
            "running": running,
            "waiting": waiting,
            "situation": "churn" if churn else "nothing changes",
            **_median_of(measured[preset, running, waiting, churn]),
        }
        for preset, running, waiting, churn in cases
    ]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.json:
        report = {
            "commit": revision(ROOT),
            "machine": machine(),
            "rounds": ROUNDS,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
