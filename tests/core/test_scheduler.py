"""The mechanism, one situation at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.core.memory import prefix_keys
from penstock.core.policies import presets
from penstock.core.scheduler import Scheduler
from penstock.core.types import FinishReason, Request, RequestError, Start, StepResult
from tests.core.drive import capabilities, policy
from tests.core.hand import Hand

TIGHT = capabilities(kv_blocks=12, block_size=1, max_request_tokens=12, max_batch=4)
ROOMY = capabilities(kv_blocks=200, block_size=4)


def test_all_running_requests_must_be_able_to_decode() -> None:
    with pytest.raises(
        ValueError, match=r"max_step_tokens is 7; it must be at least max_batch \(8\)"
    ):
        Scheduler(capabilities(max_batch=8, max_step_tokens=7), presets.build("vllm"))


@pytest.mark.parametrize(
    ("prompt", "cap", "message"),
    [
        (100, 101, "201 tokens together; at most 200 are allowed"),
        (150, 108, "258 tokens together; at most 200 are allowed"),
    ],
)
def test_a_request_that_is_too_long_is_refused(prompt: int, cap: int, message: str) -> None:
    hand = Hand(capabilities(), "vllm")
    with pytest.raises(RequestError, match=message) as caught:
        hand.add("a", prompt, cap)
    assert caught.value.field == "max_tokens"
    assert hand.scheduler.plan(0.0) is None


def test_a_request_that_never_fits_the_memory_is_refused_and_the_largest_is_not() -> None:
    """The last token's KV is never computed, so one more token than there is room for fits."""
    hand = Hand(capabilities(kv_blocks=5, block_size=4), "tgi")
    with pytest.raises(RequestError, match="need KV memory for 21 tokens; there is room for 20"):
        hand.add("a", 12, 10)
    hand.add("b", 12, 9)
    hand.finish()
    assert (hand.ended["b"].reason, hand.ended["b"].output_tokens) == (FinishReason.LENGTH, 9)


def test_ids_are_in_use_until_the_engine_has_been_told_to_forget() -> None:
    hand = Hand(ROOMY, "vllm")
    hand.add("a", 5, 9)
    with pytest.raises(RequestError, match="request id 'a' is in use") as caught:
        hand.add("a", 5, 9)
    assert caught.value.field == "id"
    hand.step()
    assert hand.scheduler.cancel("a")
    with pytest.raises(RequestError, match="in use"):
        hand.add("a", 5, 9)
    hand.take_ended()
    assert [drop.id for drop in hand.step().drops] == ["a"]
    hand.ended.clear()
    hand.add("a", 5, 2)
    hand.finish()
    assert hand.ended["a"].output_tokens == 2


def test_an_id_that_never_had_memory_is_free_once_it_was_told() -> None:
    hand = Hand(ROOMY, "vllm")
    hand.add("a", 5, 9)
    hand.scheduler.cancel("a")
    with pytest.raises(RequestError, match="in use"):
        hand.add("a", 5, 9)
    assert hand.scheduler.take_forgotten() == ("a",)
    hand.add("a", 5, 9)
    assert hand.scheduler.take_forgotten() == ()


def test_nothing_to_do_is_no_plan() -> None:
    assert Hand(ROOMY, "vllm").scheduler.plan(0.0) is None


def test_results_come_in_the_order_of_the_plans() -> None:
    hand = Hand(capabilities(depth=2), "vllm")
    hand.add("a", 5, 9)
    hand.plan()
    hand.plan()
    with pytest.raises(ValueError, match="result of plan 2; the oldest plan in flight is 1"):
        hand.scheduler.confirm(StepResult(2, 0.0, {}, {}))
    hand.confirm()
    hand.confirm()
    with pytest.raises(ValueError, match="result of plan 2; the oldest plan in flight is None"):
        hand.scheduler.confirm(StepResult(2, 0.0, {}, {}))


def test_a_life_in_plans() -> None:
    """Chunks of at most the budget, one token from the last, then one a step up to the cap."""
    hand = Hand(capabilities(max_batch=4, max_step_tokens=8, block_size=4), "vllm")
    hand.add("a", 18, 3)
    first, second, third = hand.step(), hand.step(), hand.step()
    assert [(start.id, start.tokens, start.cached) for start in first.starts] == [("a", 18, ())]
    chunks = [plan.chunks[0] for plan in (first, second, third)]
    assert [(c.start, c.tokens, c.samples) for c in chunks] == [
        (0, 8, False),
        (8, 8, False),
        (16, 2, True),
    ]
    assert [hand.step().decode for _ in range(2)] == [("a",), ("a",)]
    assert hand.ended["a"].reason is FinishReason.LENGTH
    assert hand.tokens["a"] == 3
    last = hand.step()
    assert (last.tokens, [(drop.id, drop.final) for drop in last.drops]) == (0, [("a", True)])
    assert hand.scheduler.plan(0.0) is None
    assert [plan.number for plan in (first, second, third, last)] == [1, 2, 3, 6]


def test_a_step_in_which_nothing_changes_names_the_same_tuple() -> None:
    hand = Hand(ROOMY, "vllm")
    hand.add("a", 5, 50)
    hand.add("b", 5, 50)
    hand.step()
    decode = hand.step().decode
    assert all(hand.step().decode is decode for _ in range(20))
    hand.step(stop=["a"])
    assert hand.step().decode == ("b",)


def test_what_follows_does_not_depend_on_the_order_in_which_an_engine_names_ends() -> None:
    def after(*stops: str) -> tuple[list[str], tuple[str, ...], list[str]]:
        hand = Hand(ROOMY, "vllm")
        for name in "abcdef":
            hand.add(name, 5, 50)
        hand.step()
        hand.step(stop=stops)
        plan = hand.step()
        return list(hand.ended), plan.decode, [drop.id for drop in plan.drops]

    assert after("e", "a", "c") == after("a", "c", "e") == after("c", "e", "a")


def test_stop_and_length_at_the_same_token_are_a_stop() -> None:
    hand = Hand(ROOMY, "vllm")
    hand.add("a", 5, 2)
    hand.step()
    hand.step(stop=["a"])
    assert (hand.ended["a"].reason, hand.ended["a"].output_tokens) == (FinishReason.STOP, 2)


def test_memory_named_by_a_plan_in_flight_is_not_handed_out() -> None:
    """``a`` stops in plan 2; plan 3, already made, still computes with its blocks."""
    machine = capabilities(kv_blocks=12, block_size=1, max_request_tokens=12, max_batch=4, depth=2)
    hand = Hand(machine, "tgi")
    hand.add("a", 6, 6)
    hand.add("b", 6, 6)
    hand.plan()
    hand.plan()
    hand.confirm()
    hand.plan()
    hand.confirm(stop=["a"])
    used = hand.scheduler.stats(0.0).kv_used
    assert used == 8, "6 of the prompt, 2 steps, of which one was for nothing"
    waiting = hand.scheduler.plan(0.0)
    assert waiting is None, "b may not have a's memory yet"
    assert hand.confirm() == {"a"}
    plan = hand.plan()
    assert [drop.id for drop in plan.drops] == ["a"]
    assert [start.id for start in plan.starts] == ["b"]


def test_a_token_that_was_planned_before_the_stop_was_known_is_void() -> None:
    hand = Hand(capabilities(depth=2), "vllm")
    hand.add("a", 5, 50)
    hand.add("b", 5, 50)
    hand.plan()
    hand.plan()
    assert hand.confirm(stop=["a"]) == frozenset()
    assert hand.confirm() == {"a"}
    assert hand.ended["a"].output_tokens == hand.tokens["a"] == 1
    assert hand.tokens["b"] == 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_request_has_no_token_of_the_step_in_which_it_failed(depth: int) -> None:
    hand = Hand(capabilities(depth=depth), "vllm")
    hand.add("a", 5, 50)
    hand.add("b", 5, 50)
    hand.step()
    for _ in range(depth):
        hand.plan()
    stale = hand.confirm(fail=["a"])
    assert stale == {"a"}
    ended = hand.ended["a"]
    assert (ended.reason, ended.detail, ended.output_tokens) == (FinishReason.FAILED, "broken", 1)
    hand.finish()
    assert hand.ended["b"].output_tokens == hand.tokens["b"] == 50


def test_a_request_that_fails_at_its_cap_has_failed() -> None:
    hand = Hand(ROOMY, "vllm")
    hand.add("a", 5, 2)
    hand.step()
    hand.plan()
    hand.confirm(fail=["a"])
    assert (hand.ended["a"].reason, hand.ended["a"].output_tokens) == (FinishReason.FAILED, 1)


def test_the_latest_arrived_gives_its_memory_back_and_comes_first_again() -> None:
    hand = Hand(TIGHT, "vllm")
    for name in ("a", "b", "c"):
        hand.add(name, 5, 7)
    assert [start.id for start in hand.step().starts] == ["a", "b"]
    hand.step()
    plan = hand.step()
    assert [(drop.id, drop.final) for drop in plan.drops] == [("b", False)]
    assert plan.decode == ("a",)
    explained = hand.scheduler.explain("c")
    assert explained is not None
    assert explained.startswith("waiting: behind b")
    starts = [start for plan in hand.finish() for start in plan.starts]
    assert [start.id for start in starts] == ["b", "c"]
    assert starts[0].tokens == 7, "the prompt, and the two tokens that it had"
    assert [hand.ended[name].output_tokens for name in "abc"] == [7, 7, 7]
    assert [hand.ended[name].evictions for name in "abc"] == [0, 1, 0]


@pytest.mark.parametrize(("room", "kept"), [(5, 0), (6, 6), (100, 6)])
def test_what_is_evicted_goes_on_from_host_memory_if_that_has_room(room: int, kept: int) -> None:
    hand = Hand(replace(TIGHT, swap_tokens=room), "vllm")
    for name in ("a", "b"):
        hand.add(name, 5, 7)
    for _ in range(2):
        hand.step()
    plan = hand.step()
    assert [(drop.id, drop.final, drop.swapped) for drop in plan.drops] == [("b", False, kept)]
    explained = hand.scheduler.explain("b")
    assert explained is not None
    assert (f"KV of {kept} tokens is in host memory" in explained) == (kept > 0)
    later = hand.finish()
    assert [start for plan in later for start in plan.starts] == [Start("b", 7, (), kept)]
    chunks = [chunk for plan in later for chunk in plan.chunks]
    assert [(chunk.start, chunk.tokens) for chunk in chunks] == [(kept, 7 - kept)]
    assert hand.ended["b"].output_tokens == 7


def test_whoever_ends_while_swapped_leaves_host_memory() -> None:
    hand = Hand(replace(TIGHT, swap_tokens=6), "vllm")
    for name in ("a", "b", "c"):
        hand.add(name, 5, 7)
    for _ in range(3):
        hand.step()
    hand.scheduler.check()
    assert hand.scheduler.cancel("b")
    hand.scheduler.check()
    hand.finish()
    hand.scheduler.check()
    assert hand.ended["c"].output_tokens == 7


def test_one_evicted_from_a_plan_in_flight_starts_again_with_that_plans_token() -> None:
    machine = capabilities(kv_blocks=12, block_size=1, max_request_tokens=12, max_batch=4, depth=3)
    hand = Hand(machine, "vllm")
    hand.add("a", 5, 7)
    hand.add("b", 5, 7)
    starts = []
    for _ in range(40):
        plan = hand.scheduler.plan(0.0) if len(hand.flight) < 3 else None
        if plan is not None:
            hand.flight.append(plan)
            starts += [(s.id, s.tokens, 5 + hand.tokens[s.id]) for s in plan.starts]
        elif hand.flight:
            hand.confirm()
    assert [name for name, _, _ in starts] == ["a", "b", "b"]
    assert all(tokens == confirmed for _, tokens, confirmed in starts)
    assert hand.ended["b"].output_tokens == 7


def test_one_evicted_from_a_plan_in_flight_waits_for_that_plan() -> None:
    """Until then nobody knows whether it has not ended with that plan's token."""
    made = presets.build("vllm", watermark=1.0)
    hand = Hand(replace(TIGHT, kv_blocks=14, depth=3), made)
    hand.add("x", 4, 1)
    hand.add("a", 4, 8)
    hand.add("b", 4, 8)
    hand.plan()
    hand.plan()
    assert [drop.id for drop in hand.plan().drops] == ["b"]
    hand.confirm()
    plan = hand.plan()
    assert [drop.id for drop in plan.drops] == ["x"]
    assert plan.starts == (), "x has left room enough"
    hand.confirm()
    assert [(start.id, start.tokens) for start in hand.plan().starts] == [("b", 6)]
    hand.finish()
    assert [hand.ended[name].output_tokens for name in "xab"] == [1, 8, 8]


def test_stats_are_what_is_there() -> None:
    hand = Hand(TIGHT, "tgi")
    hand.add("a", 4, 4)
    hand.add("b", 8, 4)
    hand.step()
    stats = hand.scheduler.stats(0.0)
    assert (stats.waiting, stats.waiting_tokens, stats.running, stats.decoding) == (1, 8, 1, 1)
    assert (stats.kv_blocks, stats.block_size, stats.kv_used, stats.kv_idle) == (12, 1, 4, 0)
    assert (stats.plans, stats.evictions, stats.admissions) == (1, 0, 1)
    assert stats.kv_usage == 4 / 12
    assert (stats.load.waiting, stats.load.waiting_tokens) == (1, 8)
    hand.step()
    assert hand.scheduler.stats(0.0).kv_used == 5


def test_explain_says_where_a_request_stands() -> None:
    hand = Hand(TIGHT, "tgi")
    for name in ("a", "b", "c"):
        hand.add(name, 6, 6)
    assert hand.scheduler.explain("a") == "waiting: not considered yet"
    hand.step()
    hand.step()
    why = "KV memory: 12 blocks reserved and 12 to reserve are more than 12"
    assert hand.scheduler.explain("a") == "decode: 2 of at most 6 output tokens"
    assert hand.scheduler.explain("b") == f"waiting: {why}"
    assert hand.scheduler.explain("c") == f"waiting: behind b ({why})"
    assert hand.scheduler.explain("nobody") is None
    hand.finish()
    assert hand.scheduler.explain("a") is None


def test_explain_names_a_full_batch() -> None:
    hand = Hand(capabilities(max_batch=1), "vllm")
    hand.add("a", 5, 9)
    hand.add("b", 5, 9)
    hand.step()
    hand.step()
    assert hand.scheduler.explain("b") == "waiting: the batch is full: 1 of 1 places taken"


def test_true_lengths_reach_the_oracle_only_if_the_request_was_taken() -> None:
    hand = Hand(capabilities(kv_blocks=20, block_size=1, max_request_tokens=20), "oracle")
    hand.add("a", 5, 15, true_length=5)
    hand.add("b", 5, 15, true_length=5)
    assert [start.id for start in hand.step().starts] == ["a", "b"]
    with pytest.raises(RequestError):
        hand.add("a", 5, 15, true_length=15)
    assert hand.scheduler.policy.admit._lengths == {"a": 5, "b": 5}  # type: ignore[attr-defined]


def test_the_oracle_is_not_told_of_tokens_beyond_the_cap() -> None:
    hand = Hand(ROOMY, "oracle")
    hand.add("a", 5, 15, true_length=99)
    assert hand.scheduler.policy.admit._lengths == {"a": 15}  # type: ignore[attr-defined]


def test_studies_may_let_outputs_exceed_the_cap_that_policies_see() -> None:
    hand = Hand(ROOMY, "oracle")
    hand.scheduler = Scheduler(ROOMY, hand.scheduler.policy, enforce_caps=False)
    hand.add("a", 5, 3, true_length=9)
    assert hand.scheduler.policy.admit._lengths == {"a": 9}  # type: ignore[attr-defined]
    for _ in range(8):
        hand.step()
    assert hand.ended == {}
    hand.step(stop=["a"])
    assert (hand.ended["a"].reason, hand.ended["a"].output_tokens) == (FinishReason.STOP, 9)
    hand.finish()


def test_blocks_held_while_a_step_runs() -> None:
    hand = Hand(TIGHT, "vllm")
    hand.add("a", 5, 2)
    held = []
    for _ in range(3):
        hand.step()
        held.append((hand.scheduler.step_blocks, hand.scheduler.stats(0.0).kv_used))
    assert held == [(5, 5), (6, 0), (0, 0)], "the last step still needed what is given back now"


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_prefixes_are_shared_only_where_the_engine_can(*, prefix_cache: bool) -> None:
    hand = Hand(capabilities(prefix_cache=prefix_cache), "vllm")
    keys = prefix_keys(range(12), 4)
    hand.add("a", 12, 5, prefix=keys)
    plan = hand.step()
    assert len(plan.chunks[0].publish) == (3 if prefix_cache else 0)
    hand.add("b", 12, 5, prefix=keys)
    plan = hand.step()
    assert len(plan.starts[0].cached) == (2 if prefix_cache else 0)
    hand.finish()


def test_more_prefix_keys_than_full_blocks_are_refused() -> None:
    """Or blocks with generated tokens would be published under a prompt's key."""
    hand = Hand(capabilities(prefix_cache=True), "vllm")
    keys = prefix_keys(range(12), 4)
    with pytest.raises(RequestError, match="3 keys for 2 full blocks of 4 tokens") as caught:
        hand.add("a", 11, 5, prefix=keys)
    assert caught.value.field == "prefix"


def test_a_request_that_goes_on_from_the_scheduler_leaves_nothing_behind() -> None:
    hand = Hand(ROOMY, "past-future")
    request = Request("a", 5, 5, 0.0)
    for _ in range(3):
        hand.scheduler.add(request)
        hand.finish()
        hand.ended.clear()
        hand.scheduler.take_forgotten()
    books = hand.scheduler._books
    assert not books.leaving.ids
    assert not books.entries
    assert not books.deadlines._heap


def test_blocks_of_a_failed_chunk_are_not_shared_any_more() -> None:
    """An engine that failed to compute a published block must not be asked for it again."""
    machine = capabilities(prefix_cache=True, max_step_tokens=16)
    scheduler = Scheduler(machine, policy("vllm"))
    prompt = tuple(range(9))
    keys = prefix_keys(prompt, machine.block_size)
    scheduler.add(Request("a", len(prompt), 4, 0.0, prefix=keys))
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert [key for chunk in plan.chunks for _, key in chunk.publish] == list(keys)
    scheduler.confirm(StepResult(plan.number, 0.0, {}, {}, {"a": "lost"}))
    scheduler.add(Request("b", len(prompt), 4, 0.0, prefix=keys))
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert set(plan.forget) == set(keys)
    assert plan.starts[0].cached == ()
    # What it computes itself is published anew.
    assert [key for chunk in plan.chunks for _, key in chunk.publish] == list(keys)
    scheduler.check()


def test_prefixes_are_forgotten_while_nobody_holds_them() -> None:
    hand = Hand(capabilities(prefix_cache=True), "vllm")
    keys = prefix_keys(range(12), 4)
    hand.add("a", 12, 5, prefix=keys)
    hand.step()
    assert not hand.scheduler.forget_prefixes(), "somebody holds blocks"
    hand.finish()
    assert hand.scheduler.stats(0.0).kv_idle == 3
    assert hand.scheduler.forget_prefixes()
    assert hand.scheduler.stats(0.0).kv_idle == 0
    hand.add("b", 12, 5, prefix=keys)
    plan = hand.step()
    assert set(plan.forget) == set(keys), "the engine is told"
    assert plan.starts[0].cached == ()
    hand.finish()


def test_blocks_of_a_capped_answer_stay_where_the_engine_names_them() -> None:
    scheduler = Scheduler(capabilities(prefix_cache=True), presets.build("vllm"))
    scheduler.add(Request("a", 7, 1, 0.0))
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.capped == ("a",)
    scheduler.confirm(StepResult(plan.number, 0.1, {}, {}, capped={"a": (b"block",)}))
    drop = scheduler.plan(0.0)
    assert drop is not None
    assert drop.drops[0].publish == ((0, b"block"),)
    assert scheduler.stats(0.0).kv_idle == 1


def test_everybody_may_be_evicted_between_steps_and_begins_again() -> None:
    hand = Hand(capabilities(), "vllm")
    for name in ("a", "b"):
        hand.add(name, 5, 6)
    hand.step()
    hand.step()
    scheduler = hand.scheduler
    assert scheduler.evict_all(0.0)
    assert scheduler.stats(0.0).kv_used == 0
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert {drop.id for drop in plan.drops} == {"a", "b"}
    assert {start.id for start in plan.starts} == {"a", "b"}
    assert not scheduler.evict_all(0.0), "a plan is in flight"
