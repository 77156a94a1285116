"""``penstock.simulate``: an object for notebooks, whose numbers are those of its table."""

from __future__ import annotations

import numpy as np
import pytest

import penstock
from penstock.bench.workload import Workload

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


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="requets"):
        penstock.simulate(kv_tokens=300, steps_only=True, requets=5)
