"""``penstock.simulate``: an object for notebooks, whose numbers are those of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock
from penstock.bench.workload import Workload
from penstock.sim.spec import RunSpec, policy_of
from penstock.sim.study import behaviour

LOAD = {"input": "uniform:4-40", "output": "uniform:2-20", "requests": 60, "clients": 60}


def test_the_summary_agrees_with_the_table() -> None:
    done = penstock.simulate("vllm", kv_tokens=300, steps_only=True, slo="ttft=30", seed=4, **LOAD)
    table = done.table()
    assert len(table) == done.summary.attempts == 60
    assert table["evictions"].sum() == done.summary.evictions > 0
    assert table["met"].mean() == pytest.approx(done.summary.attainment)
    assert 0 < done.summary.attainment < 1
    assert (table["ttft_s"] <= table["e2e_s"]).all()
    good = table.filter("met")["output_tokens"].sum()
    assert good / done.summary.seconds == pytest.approx(done.summary.goodput_output_tps)


def test_it_shows_itself() -> None:
    done = penstock.simulate("tgi", kv_tokens=300, steps_only=True, cap=20, **LOAD)
    assert done.behaviour is not None
    text, page = repr(done), done._repr_html_()
    for shown in (text, page):
        assert "tgi" in shown
        assert f"{done.behaviour.decode_steps:,}" in shown
    assert page.count("<tr>") == len(done.lines())
    assert done.to_dict()["decode_steps"] == done.behaviour.decode_steps


def test_a_workload_of_ones_own() -> None:
    lengths = np.array([5, 6, 7])
    made = Workload("<mine>", lengths, lengths)
    done = penstock.simulate(kv_tokens=40, steps_only=True, clients=2, workload=made)
    assert sorted(done.table()["prompt_tokens"]) == [5, 6, 7]
    assert "&lt;mine&gt;" in done._repr_html_()
    with pytest.raises(ValueError, match="can never fit"):
        penstock.simulate(kv_tokens=10, steps_only=True, clients=2, workload=made)


def test_a_workload_of_ones_own_keeps_the_promises_that_are_given() -> None:
    lengths = np.array([5, 6, 7])
    made = Workload("<mine>", lengths, lengths)
    settings = {"kv_tokens": 40, "profile": "llama-3.1-8b/h100", "clients": 2, "workload": made}
    assert penstock.simulate(**settings).summary.attainment == 1.0
    assert penstock.simulate(**settings, slo=("ttft=1e-9",)).summary.attainment == 0.0
    with pytest.raises(ValueError, match="rate is 2; a workload that is given has its own"):
        penstock.simulate(**{**settings, "clients": None}, rate=2)


def test_a_workload_that_cannot_be_simulated_is_refused() -> None:
    def refused(made: Workload, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            penstock.simulate(kv_tokens=40, steps_only=True, workload=made)

    lengths, zero, none = np.array([5, 6]), np.array([5, 0]), np.array([], dtype=np.int64)
    refused(Workload("mine", none, none), "mine: the workload has 0 requests")
    refused(Workload("mine", lengths, zero), r"request 1 \(.*\), output tokens is 0; .* at least 1")
    refused(Workload("mine", zero, lengths), r"request 1 \(.*\), prompt tokens is 0; .* at least 1")
    never = np.array([0.0, np.nan])
    refused(Workload("mine", lengths, lengths, never), "job 1 arrives at nan")


def test_outputs_cut_at_the_cap_are_noted() -> None:
    made = Workload("mine", np.array([5, 6, 7]), np.array([2, 3, 4]))
    asked = {"kv_tokens": 40, "clients": 1, "cap": 2, "workload": made}
    done = penstock.simulate(profile="llama-2-7b/a100-80g", **asked)
    assert done.table()["output_tokens"].to_list() == [2, 2, 2]
    assert done.summary.notes == ("2 outputs cut at the cap of 2",)
    assert penstock.simulate(steps_only=True, **asked).summary.notes == ()


def test_instances_are_counted_together() -> None:
    settings = {"kv_tokens": 300, "steps_only": True, "requests": 60, "seed": 4}
    load = {"input": "uniform:4-40", "output": "uniform:2-20", "rate": 3.0}
    done = penstock.simulate("vllm", instances=3, **settings, **load)
    parts = [behaviour(run, 300) for run in done.runs]
    steps = [part.decode_steps for part in parts]
    assert len(set(steps)) > 1
    assert done.behaviour.decode_steps == sum(steps)
    for name in ("memory", "peak"):
        mean = np.average([getattr(part, name) for part in parts], weights=steps)
        assert getattr(done.behaviour, name) == pytest.approx(mean)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="requets"):
        penstock.simulate(kv_tokens=300, steps_only=True, requets=5)


def test_an_instance_behind_a_dispatcher_is_the_instance_by_itself() -> None:
    """With its profile as Kairos's first table, and its own period of passes."""

    def latency(preset: str, **more: Any) -> dict[str, Any]:
        settings = {
            "kv_tokens": 3000,
            "profile": "llama-2-7b/a100-80g",
            "requests": 60,
            "rate": 20.0,
        }
        settings |= {"input": "uniform:20-400", "output": "uniform:10-200", "slo": "tpot=0.03"}
        done = penstock.simulate(preset, **settings, **more)
        return done.summary.latency

    literal = latency("kairos-literal")
    assert latency("kairos-literal", place="round-robin")["e2e"] == pytest.approx(literal["e2e"])
    rare = latency("vllm", plan_every=40)
    assert latency("vllm", plan_every=40, place="round-robin")["e2e"] == pytest.approx(rare["e2e"])
    assert latency("vllm")["ttft"]["mean"] < rare["ttft"]["mean"]


def test_instances_draw_for_themselves() -> None:
    spec = RunSpec(preset="past-future", kv_tokens=100, profile="llama-2-7b/a100-80g", seed=3)
    first, second = (policy_of(spec, number).admit.rng.random() for number in (0, 1))
    assert first != second
    assert first == policy_of(spec).admit.rng.random()


def test_how_requests_come_is_the_commands_default(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,20,30\n1.5,10,5\n")
    settings = {"kv_tokens": 200, "trace": str(trace)}
    done = penstock.simulate("vllm", profile="llama-2-7b/a100-80g", **settings)
    assert done.spec.arrivals == "trace"
    assert done.table()["arrival_s"].to_list() == [0.0, 1.5]
    done = penstock.simulate("vllm", steps_only=True, **settings)
    assert done.table()["arrival_s"].to_list() == [0.0, 0.0]
    with pytest.raises(ValueError, match="--clients"):
        penstock.simulate("vllm", kv_tokens=9000, profile="llama-2-7b/a100-80g", lengths="sharegpt")
