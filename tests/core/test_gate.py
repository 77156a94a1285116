"""The gate: refuse before it costs anything, with an honest time to come back."""

from __future__ import annotations

import pytest

from penstock.core.gate import Limits, Load, gate
from penstock.core.types import SLO, OnMiss, Request


def request(
    prompt: int = 10, *, ttft: float | None = None, on_miss: OnMiss = OnMiss.KEEP
) -> Request:
    return Request("a", prompt, 5, 0.0, slo=SLO(ttft=ttft), on_miss=on_miss)


def test_without_limits_and_promises_everyone_enters() -> None:
    assert gate(Load(10**6, 10**9, 0.001), request(), Limits()) is None


@pytest.mark.parametrize(("waiting", "refused"), [(0, False), (4, False), (5, True), (6, True)])
def test_the_number_of_waiting_requests(waiting: int, *, refused: bool) -> None:
    refusal = gate(Load(waiting, 0, 2.0), request(), Limits(max_waiting=5))
    assert (refusal is not None) == refused
    if refusal is not None:
        assert refusal.limit == "max_waiting"
        assert refusal.reason == f"{waiting} requests are waiting; the limit is 5"
        assert refusal.predicted_wait == waiting / 2.0
        assert refusal.retry_after == 3


@pytest.mark.parametrize(("tokens", "refused"), [(90, False), (91, True), (500, True)])
def test_the_number_of_waiting_tokens(tokens: int, *, refused: bool) -> None:
    refusal = gate(Load(1, tokens, None), request(10), Limits(max_waiting_tokens=100))
    assert (refusal is not None) == refused
    if refusal is not None:
        assert refusal.limit == "max_waiting_tokens"
        assert f"{tokens} prompt tokens are waiting and this request has 10" in refusal.reason
        assert "the limit is 100" in refusal.reason


def test_a_prompt_longer_than_the_token_limit_enters_an_empty_queue() -> None:
    """Or it could never be served at all."""
    limits = Limits(max_waiting_tokens=100)
    assert gate(Load(0, 0, None), request(1000), limits) is None
    assert gate(Load(1, 1, None), request(1000), limits) is not None


def test_a_promise_that_cannot_be_kept_is_not_made() -> None:
    load = Load(waiting=10, waiting_tokens=0, rate=2.0)
    refusal = gate(load, request(ttft=1.5, on_miss=OnMiss.EXPIRE), Limits())
    assert refusal is not None
    assert refusal.limit == "slo.ttft"
    assert refusal.reason == "the predicted wait of 5.00 s exceeds the TTFT promise of 1.5 s"
    assert refusal.predicted_wait == 5.0
    assert refusal.retry_after == 4, "3.5 s too many, in whole seconds"
    assert gate(load, request(ttft=5.0, on_miss=OnMiss.EXPIRE), Limits()) is None


@pytest.mark.parametrize("on_miss", [OnMiss.KEEP, OnMiss.DEMOTE])
def test_a_request_that_would_be_served_late_anyway_enters(on_miss: OnMiss) -> None:
    assert gate(Load(10, 0, 0.1), request(ttft=0.5, on_miss=on_miss), Limits()) is None


def test_a_wait_that_nobody_knows_refuses_nobody() -> None:
    """A guess is good enough to say when to come back, not to send someone away."""
    load = Load(waiting=1, waiting_tokens=10, rate=None)
    assert gate(load, request(ttft=0.5, on_miss=OnMiss.EXPIRE), Limits()) is None
    refusal = gate(load, request(), Limits(max_waiting=1))
    assert refusal is not None
    assert refusal.retry_after == 1


def test_nobody_waits_behind_nobody() -> None:
    assert Load(0, 0, 0.001).predicted_wait == 0.0
    assert gate(Load(0, 0, 0.001), request(ttft=1e-3, on_miss=OnMiss.EXPIRE), Limits()) is None


@pytest.mark.parametrize("name", ["max_waiting", "max_waiting_tokens"])
def test_negative_limits_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is -1; it must be 0 \(unbounded\) or more"):
        Limits(**{name: -1})
