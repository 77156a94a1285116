"""What the behaviour study counts, by hand and by property."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.forecast.latency.affine import DecodeSteps
from penstock.core.policies import presets
from penstock.core.policies.admit.conservative import Conservative
from penstock.core.types import Capabilities
from penstock.sim.run import Job, Run, run
from penstock.sim.simulation import simulate
from penstock.sim.sources import ClosedLoop
from penstock.sim.study import (
    Overbooked,
    PromptWatermark,
    behaviour,
    count_bounces,
    study_policy,
    with_jobs,
)

MACHINE = Capabilities(
    kv_blocks=20, block_size=1, max_batch=9, max_step_tokens=50, max_request_tokens=20
)


def study(jobs: list[Job], preset: str) -> Run:
    source = ClosedLoop(jobs, max(1, len(jobs)))
    return run(source, MACHINE, study_policy(preset, seed=0), DecodeSteps(), enforce_caps=False)


def test_numbers_are_taken_until_nobody_waits() -> None:
    """The third waits for the end of the second, two decode steps on, and starts in the next."""
    jobs = [Job("a", 0, 10, 4, 9), Job("b", 0, 5, 3, 9), Job("c", 0, 8, 4, 9)]
    done = study(jobs, "vllm")
    counted = behaviour(done, 20)
    assert done.decode_steps == 6
    assert counted.decode_steps == 3
    # a holds 11, 12, 13 tokens while it decodes, b holds 6 and 7.
    assert counted.memory == pytest.approx((17 + 19 + 13) / 3 / 20)
    # Most just before b ends; alone, a will not grow any more.
    assert counted.peak == pytest.approx((19 + 19 + 13) / 3 / 20)


def test_all_of_the_run_counts_where_nobody_waits() -> None:
    done = study([Job("a", 0, 10, 4, 9)], "vllm")
    counted = behaviour(done, 20)
    assert counted.decode_steps == done.decode_steps == 3
    assert counted.memory == pytest.approx(12 / 20)
    assert counted.peak == pytest.approx(13 / 20)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=12),
    preset=st.sampled_from(sorted(presets.PRESETS)),
)
@settings(max_examples=60, deadline=None)
def test_the_peak_is_never_below_the_use(lengths: list[tuple[int, int]], preset: str) -> None:
    jobs = [Job(str(i), 0, prompt, output, 10) for i, (prompt, output) in enumerate(lengths)]
    done = study(jobs, preset)
    counted = behaviour(done, 20)
    assert 0 <= counted.decode_steps <= done.decode_steps
    assert counted.memory <= counted.peak + 1e-12
    if preset == "oracle":
        assert counted.peak <= 1


DISTRIBUTIONS = (
    {"input": "uniform:32-4096", "output": "uniform:2048-4096"},
    {"input": "uniform:3000-5000", "output": "uniform:3000-5000"},
    {"input": "uniform:2048-4096", "output": "uniform:32-4096"},
)
TABLE = [
    ("tgi", 1, 487370, 57.8, 60.8, 0.0),
    ("tgi", 2, 840650, 71.7, 75.2, 0.0),
    ("tgi", 3, 379920, 60.1, 62.0, 0.0),
    ("vllm", 1, 282230, 98.4, 102.8, 94.8),
    ("vllm", 2, 617560, 97.9, 103.5, 94.9),
    ("vllm", 3, 229090, 98.1, 100.2, 34.1),
]


def table_row(preset: str, distribution: int, requests: int, **parameters: float) -> dict[str, Any]:
    done = simulate(
        preset, kv_tokens=120_000, requests=requests, clients=requests, cap=4096, plan_every=10,
        prefill_budget=32768, steps_only=True, seed=1, parameters=parameters,
        **DISTRIBUTIONS[distribution - 1],
    )  # fmt: skip
    row = done.to_dict()
    assert row["finished"] == requests
    return row


@pytest.mark.parametrize(("preset", "distribution", "steps", "memory", "peak", "evicted"), TABLE)
def test_the_papers_table(
    preset: str, distribution: int, steps: int, memory: float, peak: float, evicted: float
) -> None:
    """Cells of the paper's table that take a second each; `benchmarks/behaviour_table.py` has all.

    The bounds are those of the benchmark; one seed has more noise in evictions, so these have 3
    points, or 6 where they exceed 30 %.
    """
    row = table_row(preset, distribution, 3000)
    assert row["decode_steps"] == pytest.approx(steps, rel=0.02)
    assert 100 * row["memory_utilization"] == pytest.approx(memory, abs=1)
    assert 100 * row["peak_memory"] == pytest.approx(peak, abs=1)
    assert 100 * row["evicted_ratio"] == pytest.approx(evicted, abs=6 if evicted > 30 else 3)


@pytest.mark.parametrize(
    ("preset", "memory", "peak", "evicted"),
    [("oracle", 96.6, 98.7, 0.0), ("past-future", 94.5, 96.6, 3.0)],
)
def test_the_papers_table_in_small(preset: str, memory: float, peak: float, evicted: float) -> None:
    """The slower presets: Distribution-3 with a fifth of the requests.

    So few requests leave the 512 of the cold start in a window of 1,000 all the while, so the
    window is 200 here, which the paper's authors used elsewhere.
    """
    parameters = {"window": 200.0} if preset == "past-future" else {}
    row = table_row(preset, 3, 600, **parameters)
    assert 100 * row["memory_utilization"] == pytest.approx(memory, abs=1.2)
    assert 100 * row["peak_memory"] == pytest.approx(peak, abs=1.2)
    assert 100 * row["evicted_ratio"] == pytest.approx(evicted, abs=4)


def test_who_was_evicted_is_let_in_by_its_prompt_and_evicted_at_once() -> None:
    """As in the artifact: the watermark overlooks what it had generated, and that counts.

    Until b ends there is room for c's prompt, but not for the tokens that it had.
    """
    jobs = [Job("a", 0, 2, 10, 12), Job("b", 0, 2, 7, 12), Job("c", 0, 2, 7, 12)]
    source = ClosedLoop(jobs, 3)
    policy = study_policy("vllm", seed=0, period=2, watermark=1.0)
    done = run(source, MACHINE, policy, DecodeSteps(), enforce_caps=False)
    counted = count_bounces(done, policy)
    assert isinstance(policy.admit, PromptWatermark)
    assert {r.job.id: r.ended.evictions for r in done.records} == {"a": 0, "b": 0, "c": 1}
    assert policy.admit.bounced.keys() == {"c"}
    assert {r.job.id: r.ended.evictions for r in counted.records}["c"] == counted.evictions
    assert counted.evictions == done.evictions + policy.admit.bounced["c"]


def test_all_whom_an_overbooked_reservation_lets_in_are_evicted_at_once() -> None:
    """While a runs, b and c fit the reservation of 30 tokens, not the memory of 20; d neither."""
    jobs = [Job("a", 0, 15, 4, 4), Job("b", 0, 6, 3, 3), Job("c", 0, 1, 1, 1), Job("d", 0, 1, 1, 1)]
    policy = with_jobs(study_policy("tgi", seed=0, over_commit=1.5), jobs)
    source = ClosedLoop(jobs, len(jobs))
    done = run(source, MACHINE, policy, DecodeSteps(), enforce_caps=False)
    assert isinstance(policy.admit, Overbooked)
    assert len(done.records) == len(jobs)
    passes = policy.admit.bounced["b"]
    assert passes >= 2
    assert policy.admit.bounced == {"b": passes, "c": passes}
    assert count_bounces(done, policy).evictions == done.evictions + 2 * passes


def test_one_that_is_tried_again_is_known_to_the_overbooked() -> None:
    jobs = [Job(str(i), 0, 6, 3, 3) for i in range(6)]
    policy = with_jobs(study_policy("tgi", seed=0, over_commit=2.0), jobs)
    source = ClosedLoop(jobs, len(jobs), retries=1, met=lambda record: record.job.attempt > 0)
    done = run(source, MACHINE, policy, DecodeSteps(), enforce_caps=False)
    assert len(done.records) == 2 * len(jobs)
    assert isinstance(policy.admit, Overbooked)
    assert any("+" in name for name in policy.admit.bounced)


def test_other_presets_are_as_they_are() -> None:
    policy = study_policy("tgi", seed=0)
    done = study([Job("a", 0, 10, 4, 9)], "tgi")
    assert isinstance(policy.admit, Conservative)
    assert count_bounces(done, policy) is done
    assert with_jobs(policy, []) is policy


@pytest.mark.parametrize("preset", ["vllm", "tgi"])
def test_blocks_of_several_tokens_are_counted_as_blocks(preset: str) -> None:
    settings: dict[str, Any] = {
        "kv_tokens": 12_800, "requests": 200, "clients": 200, "input": "uniform:32-400",
        "output": "uniform:200-400", "cap": 400, "steps_only": True,
    }  # fmt: skip
    if preset == "tgi":
        settings["parameters"] = {"over_commit": 1.25}
    one, sixteen = (simulate(preset, **settings, block_size=size).behaviour for size in (1, 16))
    assert one is not None
    assert sixteen is not None
    assert sixteen.memory == pytest.approx(one.memory, abs=0.05)


def test_prompts_of_one_token_cost_no_step() -> None:
    done = study([Job("a", 0, 1, 4, 9), Job("b", 0, 1, 4, 9)], "vllm")
    assert (done.decode_steps, done.seconds) == (3, 3.0)
