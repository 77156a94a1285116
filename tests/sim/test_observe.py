"""What is observed is what happened, and to observe changes nothing."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest

from penstock.core.policies import presets
from penstock.sim.execute import simulate_spec
from penstock.sim.figures import most_held
from penstock.sim.observe import Observation, observed
from penstock.sim.run import Run
from penstock.sim.spec import RunSpec, workload_of

SPEC = RunSpec(
    preset="vllm", input="uniform:8-40", output="uniform:4-20", requests=60, rate=0.6, cap=20,
    kv_tokens=300, max_batch=16, steps_only=True, slo=("ttft=20,gap=3",), seed=3,
)  # fmt: skip


TIMED = msgspec.structs.replace(
    SPEC, steps_only=False, profile="llama-3.1-8b/h100", rate=150.0, slo=("ttft=0.2,gap=0.05",)
)


def changed(**fields: object) -> RunSpec:
    return msgspec.structs.replace(SPEC, **fields)


def watched(spec: RunSpec) -> tuple[Run, Observation]:
    runs, observations = observed(spec, workload_of(spec))
    assert len(runs) == len(observations) == 1
    return runs[0], observations[0]


def held_at(run: Run, observation: Observation, time: float) -> int:
    """KV tokens held just before a moment, from token times alone (blocks of one token)."""
    held = 0
    for stay in observation.residencies(run):
        if stay.start < time <= stay.end:
            record = next(r for r in run.records if r.job.id == stay.id)
            # The newest token has no KV yet; the one that came at this moment is not there.
            held += record.job.prompt + sum(t < time for t in run.token_times(record))
    return held


@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_to_observe_changes_nothing(preset: str) -> None:
    spec = msgspec.structs.replace(TIMED, preset=preset)
    run, observation = watched(spec)
    (alone,) = simulate_spec(spec, workload_of(spec))
    assert [(r.job.id, r.at, r.ended) for r in run.records] == [
        (r.job.id, r.at, r.ended) for r in alone.records
    ]
    assert run.steps == alone.steps == sum(step.steps for step in observation.steps)
    assert len(observation.evictions) == run.evictions == alone.evictions
    assert len(observation.starts) == len(run.records) + run.evictions
    assert len(observation.forecasts) > 30


def test_stays_and_waits_tell_a_requests_whole_life() -> None:
    run, observation = watched(TIMED)
    assert run.evictions > 3
    by_id: dict[str, list] = {}
    for stay in observation.residencies(run):
        by_id.setdefault(stay.id, []).append(stay)
    for record in run.records:
        stays = by_id[record.job.id]
        assert stays[0].waited == record.job.arrival
        assert [stay.evicted for stay in stays] == [True] * record.ended.evictions + [False]
        assert stays[-1].end == record.at
        times = run.token_times(record)
        assert any(stay.first == times[0] for stay in stays)
        for before, after in pairwise(stays):
            assert before.start <= before.end == after.waited <= after.start


def test_queue_age_is_that_of_the_one_who_waits_longest() -> None:
    run, observation = watched(TIMED)
    times = np.linspace(0, run.seconds, 77)
    waits = observation.waits(run)
    age = observation.queue_age(run, times)
    for time, found in zip(times, age, strict=True):
        there = [time - begin for begin, end in waits if begin <= time < end]
        assert found == pytest.approx(max(there, default=0.0))
    assert age.max() > 0


def test_memory_over_time_is_what_token_times_say() -> None:
    run, observation = watched(changed(rate=0.2))
    edges = np.arange(0, run.seconds + 1)
    most = most_held(observation, edges)
    for step in observation.steps:
        if step.decoding:
            assert step.blocks_after == held_at(run, observation, step.ended)
            assert most[int(np.ceil(step.ended)) - 1] >= step.blocks_after
    assert most.max() == max(step.blocks_after for step in observation.steps)


def test_the_true_peak_comes_true_where_nobody_joins() -> None:
    spec = changed(rate=None, clients=8, requests=8, kv_tokens=1000)
    run, observation = watched(spec)
    # Once all eight have started, what they need at most is what will be held at most.
    started = max(at for at, _ in observation.starts)
    later = [forecast for forecast in observation.forecasts if forecast.at >= started]
    most = max(step.blocks_after for step in observation.steps)
    assert later[0].true == most
    assert all(forecast.low <= forecast.middle <= forecast.high for forecast in later)
    assert run.records


def test_the_forecast_is_from_the_past_and_blind_to_the_future() -> None:
    # Every output is 20 long: once that is known, the forecast is the truth.
    spec = changed(output="20", requests=1200, rate=0.2, preset="past-future")
    spec = msgspec.structs.replace(spec, parameters={"window": 20.0, "cold_start": 4.0})
    _, observation = watched(spec)
    early, late = observation.forecasts[0], observation.forecasts[-30:]
    assert early.high < early.true
    assert [f.middle for f in late] == [f.true for f in late]


def test_forecasts_stay_few_however_long_the_run() -> None:
    spec = changed(rate=None, clients=4, requests=3000, preset="vllm")
    run, observation = watched(spec)
    assert 100 < len(observation.forecasts) <= 601
    assert observation.forecasts[-1].at > 0.9 * run.seconds
    gaps = np.diff([forecast.at for forecast in observation.forecasts])
    assert gaps.max() < run.seconds / 50


def test_several_instances_are_observed_one_by_one() -> None:
    spec = changed(instances=3)
    runs, observations = observed(spec, workload_of(spec))
    assert len(runs) == len(observations) == 3
    for run, observation in zip(runs, observations, strict=True):
        assert {name for _, name in observation.starts} == {r.job.id for r in run.records}
        assert observation.forecasts == []
