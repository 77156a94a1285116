"""A request may be ended from outside in every state, and only once."""

from __future__ import annotations

import pytest

from penstock.core.types import FinishReason
from tests.core.drive import capabilities
from tests.core.hand import Hand


@pytest.mark.parametrize("depth", [1, 2])
def test_cancel_a_waiting_request(depth: int) -> None:
    hand = Hand(capabilities(depth=depth), "vllm")
    hand.add("a", 5, 9)
    assert hand.scheduler.cancel("a", detail="left")
    hand.take_ended()
    assert hand.ended["a"].detail == "left"
    assert (hand.ended["a"].reason, hand.ended["a"].output_tokens) == (FinishReason.CANCELLED, 0)
    assert not hand.scheduler.cancel("a")
    assert not hand.scheduler.cancel("never was")
    assert hand.scheduler.plan(0.0) is None


def test_cancel_in_prefill() -> None:
    hand = Hand(capabilities(max_batch=4, max_step_tokens=8), "vllm")
    hand.add("a", 30, 9)
    hand.step()
    assert hand.scheduler.explain("a") == "prefill: 8 of 30 tokens computed"
    hand.scheduler.cancel("a")
    plan = hand.step()
    assert [drop.id for drop in plan.drops] == ["a"]
    assert plan.tokens == 0
    assert hand.ended["a"].output_tokens == 0
    hand.finish()


@pytest.mark.parametrize(("depth", "known"), [(1, 3), (2, 2), (3, 1)])
def test_cancel_while_decoding_counts_confirmed_tokens_only(depth: int, known: int) -> None:
    hand = Hand(capabilities(depth=depth), "vllm")
    hand.add("a", 5, 50)
    for _ in range(3):
        hand.plan()
    while len(hand.flight) >= depth:
        hand.confirm()
    assert hand.tokens["a"] == 3 - depth + 1 == known
    hand.scheduler.cancel("a")
    while hand.flight:
        assert hand.scheduler.plan(0.0) is None, "memory of a plan in flight"
        assert hand.confirm() == {"a"}, "its tokens are void"
    drops = hand.step().drops
    assert hand.ended["a"].output_tokens == known
    assert [drop.id for drop in drops] == ["a"]
    hand.finish()


def test_cancel_while_draining() -> None:
    hand = Hand(capabilities(depth=2), "vllm")
    hand.add("a", 5, 2)
    hand.plan()
    hand.plan()
    assert hand.scheduler.explain("a") == "draining: 0 of at most 2 output tokens"
    hand.confirm()
    assert hand.scheduler.explain("a") == "draining: 1 of at most 2 output tokens"
    hand.scheduler.cancel("a")
    assert hand.confirm() == {"a"}
    assert (hand.ended["a"].reason, hand.ended["a"].output_tokens) == (FinishReason.CANCELLED, 1)
    hand.finish()


@pytest.mark.parametrize("depth", [1, 2])
def test_cancel_while_evicted(depth: int) -> None:
    hand = Hand(
        capabilities(kv_blocks=12, block_size=1, max_request_tokens=12, depth=depth), "vllm"
    )
    hand.add("a", 5, 7)
    hand.add("b", 5, 7)
    while hand.scheduler.stats(0.0).evictions == 0:
        if len(hand.flight) == depth:
            hand.confirm()
        hand.plan()
    explained = hand.scheduler.explain("b")
    assert explained is not None
    assert explained.startswith("evicted: ")
    hand.scheduler.cancel("b")
    before = hand.tokens["b"]
    while hand.flight:
        hand.confirm()
    assert hand.ended["b"].output_tokens == before == hand.tokens["b"]
    assert hand.scheduler.take_forgotten() == ("b",)
    assert not any(drop.id == "b" for plan in hand.finish() for drop in plan.drops)
