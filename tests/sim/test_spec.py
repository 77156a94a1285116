"""A specification decides its run: hashes, validation, instances, and agreement with ``run``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from penstock.sim.execute import one_run
from penstock.sim.spec import RunSpec, capabilities_of, digest_of, jobs_of, workload_of

SMALL = RunSpec(
    preset="past-future",
    input="uniform:4-40",
    output="uniform:2-20",
    requests=60,
    clients=12,
    cap=20,
    kv_tokens=300,
    max_batch=16,
    steps_only=True,
    slo=("ttft=8,gap=3",),
    seed=4,
)


def changed(**fields: object) -> RunSpec:
    return msgspec.structs.replace(SMALL, **fields)


def test_the_same_specification_gives_the_same_result() -> None:
    first, second = one_run(SMALL), one_run(SMALL)
    again = msgspec.structs.replace(second, wall_s=first.wall_s)
    assert first == again
    assert first.finished == first.attempts == 60
    assert 0 < first.memory < 1
    assert first.attainment is not None
    assert first.classes["default"].attainment == first.attainment
    assert first.evicted_ratio == first.evictions / 60
    assert one_run(changed(seed=5)).goodput_output_tps != first.goodput_output_tps


def test_a_key_names_everything_that_decides_the_outcome() -> None:
    others = [
        changed(**{name: value})
        for name, value in {
            "preset": "tgi", "parameters": {"reserve": 0.05}, "output": "uniform:2-21",
            "requests": 61, "clients": 13, "cap": 21, "kv_tokens": 301, "block_size": 2,
            "max_batch": 17, "prefill_budget": 99, "plan_every": 2, "slo": (), "seed": 5,
        }.items()
    ]  # fmt: skip
    assert len({SMALL.key(), *(spec.key() for spec in others)}) == len(others) + 1
    packed = msgspec.json.encode(SMALL)
    assert msgspec.json.decode(packed, type=RunSpec).key() == SMALL.key()


def test_a_round_robin_over_two_machines_is_two_runs_of_every_other_request() -> None:
    whole = changed(clients=None, rate=2.0, instances=2)
    jobs = jobs_of(whole, workload_of(whole))
    one = one_run(whole)
    alone = one_run(changed(clients=None, rate=2.0))
    assert [job.id for job in jobs[::2]][:3] == ["0", "2", "4"]
    assert one.finished == alone.finished == 60
    # Twice the memory for the same arrivals: nobody waits longer, all in all.
    assert one.latency["ttft"]["mean"] < alone.latency["ttft"]["mean"]
    assert one.evictions <= alone.evictions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps_only": False}, "give a profile, or steps_only"),
        ({"kv_tokens": 0}, "kv_tokens is 0"),
        ({"instances": 2}, "without a place, several need an open loop"),
        ({"cap": 0}, "cap is 0"),
        ({"speed": 0.0}, r"speed is 0\.0"),
        ({"clients": None, "rate": float("nan")}, "rate is nan; it must be a finite number above"),
        ({"clients": None, "rate": 0.0}, r"rate is 0\.0; it must be a finite number above 0"),
        ({"clients": 0}, "clients is 0; it must be at least 1"),
        ({"prefix_cache": True}, "prefix_cache is true; steps_only counts"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"block_size": 301}, r"block_size is 301; it must be at most kv_tokens \(300\)"),
        ({"prefill_budget": 15}, r"max_batch is 16; it must be at most prefill_budget \(15\)"),
        ({"max_batch": 2049}, r"max_batch is 2049; it must be at most prefill_budget \(2048\)"),
    ],
)
def test_fields_out_of_range_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**fields)


@pytest.mark.parametrize(("budget", "batch"), [(9, 9), (1024, 1024), (2048, 1024)])
def test_no_batch_is_larger_than_the_budget(budget: int, batch: int) -> None:
    machine = capabilities_of(changed(max_batch=None, prefill_budget=budget))
    assert (machine.max_batch, machine.max_step_tokens) == (batch, budget)


@pytest.mark.parametrize(("size", "blocks"), [(1, 300), (16, 18), (300, 1)])
def test_there_are_no_more_blocks_than_memory(size: int, blocks: int) -> None:
    assert capabilities_of(changed(block_size=size)).kv_blocks == blocks


def test_the_load_is_that_of_the_arrivals() -> None:
    spec = changed(clients=None, rate=2.0, speed=4.0, requests=4000)
    last = jobs_of(spec, workload_of(spec))[-1].arrival
    assert (spec.load, spec.load_unit) == (8.0, "req/s")
    assert 4000 / last == pytest.approx(spec.load, rel=0.05)
    assert changed(clients=None, arrivals="trace", speed=4.0).load == 4.0


def test_over_no_time_there_is_no_rate() -> None:
    result = one_run(changed(output="1", clients=60))
    assert result.finished == result.attempts == 60
    assert result.seconds == result.goodput_output_tps == result.throughput_output_tps == 0
    assert result.attainment == 1


def test_a_request_that_can_never_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"request \d+ .* can never fit kv_tokens \(50\)"):
        one_run(changed(kv_tokens=50))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "best"}, "preset 'best' is unknown"),
        ({"parameters": {"watermark": 0.9}}, "has no parameter 'watermark'"),
        ({"parameters": {"seed": 1.0}}, "no parameter of a preset"),
        ({"output": "model"}, "a simulation needs output lengths"),
        ({"rate": 1.0}, "give --clients for a closed loop"),
    ],
)
def test_what_cannot_be_built_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_run(changed(**fields))


def test_another_trace_under_the_same_name_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("prompt_tokens,output_tokens\n5,3\n9,4\n", encoding="utf-8")
    spec = changed(
        input=None, output=None, requests=None, trace=str(trace), trace_digest=digest_of(trace)
    )
    assert one_run(spec).finished == 2
    trace.write_text("prompt_tokens,output_tokens\n5,3\n9,5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.csv has changed"):
        one_run(spec)


def test_a_study_in_steps_does_not_cut_outputs_at_the_cap() -> None:
    outputs = one_run(changed(cap=5, output="9")).throughput_output_tps
    assert outputs * one_run(changed(cap=5, output="9")).seconds == pytest.approx(60 * 9)
