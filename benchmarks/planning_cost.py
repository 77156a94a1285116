"""Planning cost per step: what the scheduler takes to make one plan.

Two situations, each with requests that decode and requests that wait:

* nothing changed: the queue's head stays deferred and nobody comes or goes;
* steady churn: in every step one request ends and the policy decides anew.

Run: ``python benchmarks/planning_cost.py [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
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
ROOT = Path(__file__).resolve().parents[1]
PROMPT, CAP, BLOCK = 64, 4_000, 16


def _scheduler(preset: str, running: int, waiting: int, *, churn: bool) -> Scheduler:
    """A scheduler with so many requests decoding and waiting.

    Memory binds as under heavy load.  Past-Future forecasts that the small head of the queue
    does not fit; the policies that look at the present need a large head for that.
    """
    held = PROMPT + (CAP if preset == "tgi" else STEPS + 8)
    capabilities = Capabilities(
        kv_blocks=-(-running * held // BLOCK),
        block_size=BLOCK,
        max_batch=running if churn else running + 64,
        max_step_tokens=max(8_192, 2 * running),
        max_request_tokens=running * held,
    )
    scheduler = Scheduler(capabilities, presets.build(preset, seed=1))
    for index in range(running):
        scheduler.add(Request(f"run-{index}", PROMPT, CAP, 0.0))
        if index % 64 == 63 or index == running - 1:
            _confirm(scheduler, _plan(scheduler))
    prompt = PROMPT if churn or preset == "past-future" else running * held - CAP
    for index in range(waiting):
        scheduler.add(Request(f"wait-{index}", prompt, CAP, 1.0))
    return scheduler


def _plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan(2.0)
    assert plan is not None
    return plan


def _confirm(scheduler: Scheduler, plan: StepPlan, stopped: tuple[str, ...] = ()) -> None:
    ends = dict.fromkeys(stopped, ())
    scheduler.confirm(StepResult(plan.number, 0.0, {}, ends))
    scheduler.take_ended()


def measure(preset: str, running: int, waiting: int, *, churn: bool) -> dict[str, float]:
    """Seconds per plan (and confirmation) over many steps, in microseconds."""
    scheduler = _scheduler(preset, running, waiting, churn=churn)
    steps = STEPS if running < 4_096 else STEPS // 4
    plans, confirms = [], []
    for step in range(steps):
        began = time.perf_counter()
        plan = _plan(scheduler)
        planned = time.perf_counter()
        stopped = plan.decode[:1] if churn else ()
        _confirm(scheduler, plan, stopped)
        confirms.append((time.perf_counter() - planned) * 1e6)
        if churn:
            scheduler.add(Request(f"new-{step}", PROMPT, CAP, 1.0))
        plans.append((planned - began) * 1e6)
    cuts = statistics.quantiles(plans, n=100)
    return {
        "plan_us_median": round(statistics.median(plans), 1),
        "plan_us_p99": round(cuts[98], 1),
        "confirm_us_median": round(statistics.median(confirms), 1),
    }


def main() -> None:
    """Measure every preset at every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for running, waiting in SIZES:
        for preset in ("vllm", "tgi", "past-future"):
            for churn in (False, True):
                row = {
                    "preset": preset,
                    "running": running,
                    "waiting": waiting,
                    "situation": "one ends per step" if churn else "nothing changes",
                    **measure(preset, running, waiting, churn=churn),
                }
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.json:
        report = {"commit": revision(ROOT), "machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
