"""Presets: what they are made of, and errors that say what would be right."""

from __future__ import annotations

import pytest

from penstock.core.policies import presets
from penstock.core.policies.admit.aggressive import Aggressive
from penstock.core.policies.admit.conservative import Conservative
from penstock.core.policies.admit.oracle import Oracle
from penstock.core.policies.admit.past_future import PastFuture
from penstock.core.policies.order.fcfs import Fcfs
from penstock.core.policies.order.priority import Priority

NAMES = sorted(presets.PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_can_be_built_with_its_own_parameters(name: str) -> None:
    preset = presets.PRESETS[name]
    assert preset.name == name
    assert preset.source
    built = presets.build(name, **preset.parameters)  # type: ignore[arg-type]
    assert built.period == preset.period
    assert built.per_pass == preset.per_pass


def test_the_sources_parameters() -> None:
    """The digest's table of parameter sets, for those that we name."""
    assert presets.build("vllm").admit == Aggressive(watermark=0.99)
    assert presets.build("tgi").admit == Conservative(over_commit=1.0)
    assert isinstance(presets.build("oracle").admit, Oracle)
    paper = presets.build("past-future")
    assert isinstance(paper.admit, PastFuture)
    assert (paper.admit.window, paper.admit.reserve, paper.admit.cold_start) == (1000, 0.03, None)
    assert (paper.period, paper.per_pass) == (1, 0)
    artifact = presets.build("past-future-artifact")
    assert isinstance(artifact.admit, PastFuture)
    assert artifact.admit.history.sorted_lengths().tolist() == [6000] * 20
    assert (artifact.admit.window, artifact.admit.reserve) == (40, 0.05)
    assert (artifact.period, artifact.per_pass) == (2, 1)


def test_overrides_reach_their_policy() -> None:
    built = presets.build("vllm", watermark=0.5, order="priority", period=7)
    assert built.admit == Aggressive(watermark=0.5)
    assert built.order == Priority()
    assert built.period == 7
    assert presets.build("vllm").order == Fcfs()


def test_whole_numbers_may_come_as_floats() -> None:
    built = presets.build("past-future", window=200.0, cold_start=512.0, reserve=0)
    assert isinstance(built.admit, PastFuture)
    assert built.admit.history.sorted_lengths().tolist() == [512] * 100
    again = presets.build("past-future-artifact", cold_start=None)
    assert isinstance(again.admit, PastFuture)
    assert again.admit.cold_start is None


def test_policies_are_not_shared_between_builds() -> None:
    first, second = presets.build("past-future"), presets.build("past-future")
    assert first.admit is not second.admit


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vlm", {}, "preset 'vlm' is unknown; known are: vllm, tgi, "),
        ("vllm", {"order": "lifo"}, "order 'lifo' is unknown; known are: fcfs, priority"),
        ("vllm", {"reserve": 0.1}, "preset 'vllm' has no parameter 'reserve'; it has: watermark"),
        ("oracle", {"reserve": 0.1}, "preset 'oracle' has no parameter 'reserve'; it has: none"),
        ("vllm", {"watermark": 2.0}, "watermark is 2.0; it must be in"),
        ("tgi", {"over_commit": 0.0}, "over_commit is 0.0; it must be above 0"),
        ("past-future", {"reserve": 1.0}, "reserve is 1.0; it must be in"),
        ("past-future", {"window": 1}, "window is 1; it must be at least 2"),
        ("past-future", {"cold_start": 0}, "cold_start is 0; it must be at least 1"),
        ("past-future", {"window": 10.5}, "window is 10.5; it must be a whole number"),
        ("past-future", {"window": None}, "window is None; it must be a whole number"),
        ("past-future", {"cold_start": float("inf")}, "cold_start is inf; it must be a whole"),
        ("past-future", {"reserve": None}, "reserve is None; it must be a number"),
        ("past-future", {"reserve": float("nan")}, "reserve is nan; it must be in"),
        ("vllm", {"period": 0}, "period is 0; it must be at least 1 step"),
        ("vllm", {"token_budget": -1}, "token_budget is -1; it must be 0"),
    ],
)
def test_errors_name_what_is_wrong(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.build(name, **overrides)  # type: ignore[arg-type]


def test_the_tables_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        presets.PRESETS["mine"] = presets.PRESETS["vllm"]  # type: ignore[index]
