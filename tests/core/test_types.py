"""The protocol's data: ranges are checked where they enter, and named."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from math import inf, nan

import pytest

from penstock.core.engine import Engine, Work
from penstock.core.sampling import SamplingParams
from penstock.core.types import (
    SLO,
    Capabilities,
    Chunk,
    FinishReason,
    Request,
    RequestError,
    StepPlan,
)
from penstock.testing import ScriptedEngine

MACHINE = Capabilities(
    kv_blocks=8, block_size=4, max_batch=2, max_step_tokens=16, max_request_tokens=20
)


@pytest.mark.parametrize("name", ["ttft", "tpot", "gap", "e2e"])
@pytest.mark.parametrize("value", [0.0, -1.0, inf, nan])
def test_an_slo_is_a_positive_number_of_seconds(name: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=f"slo.{name} is {value}; it must be a positive number of seconds"
    ):
        SLO(**{name: value})


def test_an_slo_may_promise_nothing() -> None:
    assert SLO() == SLO(ttft=None, tpot=None, gap=None, e2e=None)


@pytest.mark.parametrize("name", ["prompt_tokens", "cap"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_request_has_tokens(name: str, value: int) -> None:
    good = Request("a", 1, 1, 0.0)
    with pytest.raises(ValueError, match=f"request a: {name} is {value}; it must be at least 1"):
        replace(good, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["kv_blocks", "block_size", "max_batch", "max_step_tokens", "max_request_tokens", "depth"],
)
def test_capabilities_are_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"capabilities.{name} is 0; it must be at least 1"):
        replace(MACHINE, **{name: 0})  # type: ignore[arg-type]


def test_kv_tokens() -> None:
    assert MACHINE.kv_tokens == 32


def test_tokens_of_a_plan() -> None:
    chunks = (Chunk("a", 0, 5, samples=False), Chunk("b", 3, 2, samples=True))
    assert StepPlan(1, (), (), (), chunks, ("c", "d", "e")).tokens == 10
    assert StepPlan(1, (), (), (), (), ()).tokens == 0


def test_a_request_error_names_its_field() -> None:
    error = RequestError("max_tokens", "too many")
    assert isinstance(error, ValueError)
    assert (error.field, str(error)) == ("max_tokens", "too many")


def test_the_protocol_cannot_be_changed_in_passing() -> None:
    with pytest.raises(FrozenInstanceError):
        MACHINE.kv_blocks = 9  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Request("a", 1, 1, 0.0).cap = 2  # type: ignore[misc]


def test_reasons_are_words() -> None:
    assert {str(reason) for reason in FinishReason} == {
        "stop",
        "length",
        "rejected",
        "expired",
        "cancelled",
        "failed",
    }


def test_the_scripted_engine_is_an_engine() -> None:
    assert isinstance(ScriptedEngine(MACHINE), Engine)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, r"\[0, 2\]"),
        ("temperature", 2.1, r"\[0, 2\]"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", nan, r"\(0, 1\]"),
        ("top_k", -1, r"\[0, "),
        ("min_p", 1.5, r"\[0, 1\]"),
        ("repetition_penalty", 0.0, r"\[0\.01, 10\]"),
        ("presence_penalty", -2.5, r"\[-2, 2\]"),
        ("frequency_penalty", 2.5, r"\[-2, 2\]"),
        ("logprobs", 21, r"\[0, 20\]"),
    ],
)
def test_sampling_parameters_are_checked(name: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be in {allowed}"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_logit_bias_is_named_by_its_token() -> None:
    with pytest.raises(ValueError, match=r"logit_bias\[7\] is 101"):
        SamplingParams(logit_bias={7: 101})


def test_work_is_greedy_about_nothing_by_default() -> None:
    assert Work([1]).sampling == SamplingParams()
    assert Work([1]).trace_length is None
