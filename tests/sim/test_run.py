"""The simulator makes the plans of production, and its times are those of stepping one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.engine import Work
from penstock.core.forecast.latency.affine import Affine, DecodeSteps
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Ended, FinishReason, Request
from penstock.sim.link import Link
from penstock.sim.run import Job, Seen, run
from penstock.sim.sources import ClosedLoop, OpenLoop
from penstock.testing import ScriptedEngine

NAMES = sorted(presets.PRESETS)
MACHINE = Capabilities(
    kv_blocks=30, block_size=4, max_batch=6, max_step_tokens=24, max_request_tokens=60
)
# Modelled seconds of the scripted engine: a constant and a price per token of the step.
LATENCY = Affine(step=1e-3, token=1e-5, work=0.0, request=1e-5, context=0.0)

jobs = st.lists(
    st.tuples(st.floats(0, 0.05), st.integers(1, 20), st.integers(1, 25), st.integers(1, 20)),
    min_size=1,
    max_size=15,
).map(
    lambda rows: [
        Job(str(i), arrival, prompt, output, cap)
        for i, (arrival, prompt, output, cap) in enumerate(sorted(rows))
    ]
)


@pytest.mark.parametrize("name", NAMES)
@given(load=jobs)
@settings(max_examples=40, deadline=None)
def test_plans_ends_and_times_are_those_of_a_strict_engine(name: str, load: list[Job]) -> None:
    simulated = run(OpenLoop(load), MACHINE, presets.build(name, seed=3), LATENCY)

    engine = ScriptedEngine(MACHINE, step_seconds=1e-3, token_seconds=1e-5)
    now = 0.0
    runtime = Runtime(Scheduler(MACHINE, presets.build(name, seed=3)), engine, lambda: now)
    pending, ends = list(load), dict[str, Ended]()
    times: dict[str, list[float]] = {job.id: [] for job in load}
    while True:
        while pending and pending[0].arrival <= now:
            job = pending.pop(0)
            request = Request(job.id, job.prompt, job.cap, job.arrival)
            runtime.add(request, Work([1] * job.prompt, trace_length=job.output))
        output = runtime.step()
        if output is None:
            if not pending:
                break
            now = max(now, pending[0].arrival)
            continue
        now += output.seconds
        for request_id in output.tokens:
            times[request_id].append(now)
        for ended in output.ended:
            ends[ended.id] = ended

    assert {record.job.id: record.ended for record in simulated.records} == ends
    for record in simulated.records:
        got = simulated.token_times(record)
        assert got == pytest.approx(times[record.job.id], abs=1e-12)
    assert simulated.evictions == sum(end.evictions for end in ends.values())


@pytest.mark.parametrize("clients", [1, 3])
def test_clients_keep_one_request_each_outstanding(clients: int) -> None:
    load = [Job(str(i), 0.0, 5, 4, 10) for i in range(7)]
    done = run(ClosedLoop(load, clients), MACHINE, presets.build("vllm"), LATENCY)
    assert len(done.records) == len(load)
    open_at_once = [
        sum(other.job.arrival <= record.job.arrival < other.at for other in done.records)
        for record in done.records
    ]
    assert max(open_at_once) == clients


def test_caps_cut_outputs_unless_the_study_says_otherwise() -> None:
    load = [Job("a", 0.0, 5, 12, 10)]
    cut = run(OpenLoop(load), MACHINE, presets.build("vllm"), LATENCY)
    whole = run(OpenLoop(load), MACHINE, presets.build("vllm"), DecodeSteps(), enforce_caps=False)
    assert cut.records[0].ended.reason is FinishReason.LENGTH
    assert whole.records[0].ended.reason is FinishReason.STOP
    assert whole.records[0].ended.output_tokens == 12
    assert whole.seconds == whole.decode_steps == 11  # the first token comes with the prompt


def test_memory_is_the_mean_share_over_decode_steps() -> None:
    machine = Capabilities(
        kv_blocks=100, block_size=1, max_batch=1, max_step_tokens=50, max_request_tokens=60
    )
    done = run(OpenLoop([Job("a", 0.0, 10, 4, 9)]), machine, presets.build("vllm"), DecodeSteps())
    # Decode steps hold 11, 12 and 13 tokens.
    assert done.memory == pytest.approx(0.12)


def test_swapping_takes_the_time_of_the_bus_both_ways() -> None:
    machine = Capabilities(
        kv_blocks=20, block_size=1, max_batch=2, max_step_tokens=50, max_request_tokens=60,
        swap_tokens=100,
    )  # fmt: skip
    jobs = [Job(name, 0.0, 5, 12, 12) for name in "ab"]

    def seconds(bandwidth: float) -> float:
        bus = Link(10, bandwidth)
        done = run(OpenLoop(jobs), machine, presets.build("vllm"), LATENCY, bus=bus)
        assert (done.evictions, done.swapped_tokens) == (1, 10)
        assert all(record.ended.output_tokens == 12 for record in done.records)
        return done.seconds

    # 10 tokens of 10 bytes each, out and in.
    assert seconds(100.0) - seconds(1e12) == pytest.approx(2.0)
    # Recomputing is a step with 11 tokens of prompt; going on is one with a single one.
    again = run(
        OpenLoop(jobs), replace(machine, swap_tokens=0), presets.build("vllm"), LATENCY
    ).seconds
    assert again - seconds(1e12) == pytest.approx(10 * 1e-5, rel=1e-4)


def test_jobs_out_of_order_and_bad_coefficients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"job b arrives at .* before a"):
        OpenLoop([Job("a", 1.0, 5, 4, 10), Job("b", 0.0, 5, 4, 10)])
    with pytest.raises(ValueError, match="clients is 0"):
        ClosedLoop([], 0)
    with pytest.raises(ValueError, match=r"latency\.token is -1"):
        Affine(step=1, token=-1, work=0, request=0, context=0)


def test_a_watcher_sees_every_plan_with_its_times() -> None:
    seen: list[Seen] = []
    load = [Job("a", 0.5, 5, 12, 20), Job("b", 0.5, 5, 4, 20)]
    done = run(OpenLoop(load), MACHINE, presets.build("vllm"), LATENCY, watch=seen.append)
    assert done.steps == 12
    assert len(seen) < 12  # stretches are seen as one
    assert [s.began for s in seen] == pytest.approx([0.5, *(s.now for s in seen[:-1])])
    assert [start.id for s in seen for start in s.plan.starts] == ["a", "b"]
