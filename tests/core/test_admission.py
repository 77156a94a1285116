"""The admission pass: who is asked, when, and what the mechanism adds of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.memory import prefix_keys
from penstock.core.policies import presets
from penstock.core.policies.base import Admit, Answer, Defer, Judge, Policy, Reject, Skip
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended, FinishReason
from tests.core.drive import Job, capabilities, run
from tests.core.hand import Hand

NAMES = sorted(presets.PRESETS)
TIGHT = capabilities(kv_blocks=12, block_size=1, max_request_tokens=12, max_batch=4)


@dataclass
class Asked:
    """An admission policy that answers as told, and remembers who asked in which plan."""

    answers: dict[str, Answer] = field(default_factory=dict)
    holds: int | None = 1
    log: list[tuple[int, str]] = field(default_factory=list)

    def judge(self, view: Snapshot) -> Judge:
        def answer(candidate: Candidate) -> Answer:
            self.log.append((view.plan, candidate.request.id))
            return self.answers.get(candidate.request.id, Admit())

        return answer

    def observe(self, ended: Ended) -> None:
        self.log.append((0, f"{ended.id} {ended.reason}"))

    def learn_true_length(self, request_id: str, length: int) -> None:
        raise AssertionError(request_id, length)


def asked(admit: Asked, *, period: int = 1, per_pass: int = 0) -> Policy:
    return replace(presets.build("vllm"), admit=admit, period=period, per_pass=per_pass)


def starts(hand: Hand, steps: int) -> list[list[str]]:
    return [[start.id for start in hand.step().starts] for _ in range(steps)]


def test_the_first_refusal_ends_the_pass() -> None:
    """``c`` would fit, but does not overtake ``b``."""
    hand = Hand(TIGHT, "tgi")
    hand.add("a", 4, 3)
    hand.add("b", 4, 6)
    hand.add("c", 1, 1)
    assert starts(hand, 3) == [["a"], [], []]
    assert starts(hand, 1) == [["b", "c"]]


@pytest.mark.parametrize("order", ["fcfs", "urgency"])
def test_who_is_skipped_holds_nobody_up_and_keeps_its_turn(order: str) -> None:
    admit = Asked({"b": Skip("no place"), "c": Skip("no place")}, holds=None)
    hand = Hand(capabilities(), replace(asked(admit), **ordered(order)))
    for name in ("a", "b", "c", "d"):
        hand.add(name, 4, 50)
    assert starts(hand, 1) == [["a", "d"]]
    assert hand.scheduler.stats(0.0).waiting_tokens == 8
    assert "no place" in (hand.scheduler.explain("b") or "")
    hand.add("e", 4, 50)
    assert starts(hand, 2) == [["e"], []]
    assert [name for plan, name in admit.log if plan == 3] == ["b", "c"]
    admit.answers.clear()
    hand.add("f", 4, 50)
    assert starts(hand, 1) == [["b", "c", "f"]]
    hand.finish()
    assert len(hand.ended) == 6


def ordered(order: str) -> dict[str, Any]:
    made = presets.build("vllm", order=order)
    return {"order": made.order, "rank": made.rank}


def test_nobody_who_is_skipped_is_let_in_because_nothing_runs() -> None:
    admit = Asked({"a": Skip("no place"), "b": Skip("no place")}, holds=None)
    hand = Hand(capabilities(), asked(admit))
    hand.add("a", 4, 3)
    hand.add("b", 4, 3)
    assert hand.scheduler.plan(0.0) is None
    del admit.answers["b"]
    plan = hand.scheduler.plan(0.0)
    assert plan is not None
    assert [start.id for start in plan.starts] == ["b"]


def test_a_refusal_behind_one_who_is_skipped_ends_the_pass() -> None:
    admit = Asked({"b": Skip("no place"), "c": Defer("not yet")}, holds=None)
    hand = Hand(capabilities(), asked(admit))
    for name in ("a", "b", "c", "d"):
        hand.add(name, 4, 50)
    assert starts(hand, 2) == [["a"], []]
    assert admit.log == [(1, "a"), (1, "b"), (1, "c"), (2, "b"), (2, "c")]
    hand.scheduler.cancel("b")
    hand.step()
    assert admit.log[5:] in ([(0, "b cancelled")], [(0, "b cancelled"), (3, "c")])


def test_a_deferral_is_not_asked_about_again_while_it_holds() -> None:
    admit = Asked({"b": Defer("not yet")}, holds=None)
    hand = Hand(capabilities(), asked(admit))
    hand.add("a", 4, 50)
    hand.add("b", 4, 5)
    hand.add("c", 4, 5)
    for _ in range(10):
        hand.step()
    assert admit.log == [(1, "a"), (1, "b")]
    hand.add("d", 4, 5)
    hand.step()
    assert admit.log == [(1, "a"), (1, "b")], "one behind it changes nothing"
    hand.scheduler.cancel("b")
    hand.step()
    assert admit.log[2:] == [(0, "b cancelled"), (12, "c"), (12, "d")]


def test_a_deferral_ends_when_memory_is_given_back() -> None:
    admit = Asked({"c": Defer("not yet")}, holds=None)
    hand = Hand(capabilities(), asked(admit))
    hand.add("a", 4, 50)
    hand.add("b", 4, 50)
    hand.add("c", 4, 5)
    hand.step()
    hand.step(stop=["a"])
    del admit.answers["c"]
    assert starts(hand, 1) == [["c"]]


def test_an_eviction_gives_memory_back_as_well() -> None:
    """By priority, the evicted one does not even come first."""
    admit = Asked({"urgent": Defer("not yet")}, holds=None)
    made = replace(asked(admit), order=presets.build("vllm", order="priority").order)
    hand = Hand(replace(TIGHT, kv_blocks=14), made)
    hand.add("a", 5, 7)
    hand.add("b", 5, 7)
    hand.step()
    hand.add("urgent", 1, 7, priority=-1)
    while hand.scheduler.stats(0.0).evictions == 0:
        plan = hand.step()
    assert [number for number, name in admit.log if name == "urgent"] == [2, plan.number]


def test_a_deferral_holds_for_as_many_decode_steps_as_its_policy_says() -> None:
    admit = Asked({"b": Defer("not yet")}, holds=4)
    hand = Hand(capabilities(), asked(admit))
    hand.add("a", 4, 50)
    hand.add("b", 4, 5)
    for _ in range(14):
        hand.step()
    assert [plan for plan, name in admit.log if name == "b"] == [1, 6, 10, 14]


def test_nobody_is_deferred_while_nothing_runs() -> None:
    admit = Asked({"a": Defer("never"), "b": Defer("never")}, holds=None)
    hand = Hand(capabilities(), asked(admit))
    hand.add("a", 4, 3)
    hand.add("b", 4, 3)
    hand.finish()
    assert {name: end.output_tokens for name, end in hand.ended.items()} == {"a": 3, "b": 3}


def test_whom_the_mechanism_lets_in_over_a_deferral_is_alone_in_that_pass() -> None:
    """The policy does not count on it, so it must look again before it judges the next."""
    hand = Hand(capabilities(kv_blocks=10, block_size=1), "tgi")
    hand.add("large", 5, 6)
    hand.add("small", 2, 2)
    assert starts(hand, 1) == [["large"]]
    hand.finish()
    assert hand.scheduler.stats(0.0).evictions == 0
    assert [hand.ended[name].output_tokens for name in ("large", "small")] == [6, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_only_fits_alone_is_served_alone(name: str) -> None:
    """More than the watermark, the reserve, or what the forecast would ever admit."""
    hand = Hand(replace(TIGHT, max_request_tokens=13), name)
    hand.add("a", 3, 3)
    hand.add("large", 12, 1)
    hand.add("b", 3, 3)
    hand.finish()
    assert [hand.ended[each].output_tokens for each in ("a", "large", "b")] == [3, 1, 3]


def test_rejected_ones_end_with_the_reason_and_the_next_is_asked() -> None:
    admit = Asked({"a": Reject("too dear")})
    hand = Hand(capabilities(), asked(admit))
    hand.add("a", 4, 3)
    hand.add("b", 4, 3)
    assert starts(hand, 1) == [["b"]]
    ended = hand.ended["a"]
    assert (ended.reason, ended.detail, ended.output_tokens) == (
        FinishReason.REJECTED,
        "too dear",
        0,
    )
    assert (0, "a rejected") in admit.log
    assert hand.scheduler.take_forgotten() == ("a",)


def test_per_pass_is_the_most_that_one_pass_admits() -> None:
    hand = Hand(capabilities(), asked(Asked(), per_pass=2))
    for index in range(5):
        hand.add(str(index), 4, 20)
    assert starts(hand, 3) == [["0", "1"], ["2", "3"], ["4"]]


@pytest.mark.parametrize("period", [1, 2, 5])
def test_period_is_the_steps_from_one_pass_to_the_next(period: int) -> None:
    hand = Hand(capabilities(), asked(Asked(), period=period, per_pass=1))
    for index in range(4):
        hand.add(str(index), 4, 50)
    began = [step for step, names in enumerate(starts(hand, 4 * period)) if names]
    assert began == [0, period, 2 * period, 3 * period]


def test_a_pass_follows_in_the_next_step_also_while_nobody_decodes() -> None:
    """The second step of a long prompt has tokens to spare: the next request gets them."""
    hand = Hand(capabilities(max_step_tokens=16, max_batch=8), "vllm")
    for name in ("a", "b", "c"):
        hand.add(name, 20, 20)
    plans = [hand.step() for _ in range(4)]
    assert [[start.id for start in plan.starts] for plan in plans] == [["a"], ["b"], ["c"], []]
    assert [plan.tokens for plan in plans] == [16, 16, 16, 14 + 1]


def test_an_empty_machine_does_not_wait_for_the_period() -> None:
    hand = Hand(capabilities(), asked(Asked(), period=1000))
    hand.add("a", 4, 2)
    hand.finish()
    hand.add("b", 4, 2)
    assert starts(hand, 1) == [["b"]]


def test_lower_priorities_wait() -> None:
    hand = Hand(TIGHT, presets.build("tgi", order="priority"))
    hand.add("running", 6, 6)
    hand.step()
    hand.add("low", 6, 6, priority=5)
    hand.add("high", 6, 6, priority=-1)
    hand.add("mid", 6, 6)
    served = [start.id for plan in hand.finish() for start in plan.starts]
    assert served == ["high", "mid", "low"]


def test_the_batch_never_exceeds_its_limit_ended_ones_in_flight_included() -> None:
    hand = Hand(capabilities(max_batch=2, depth=2), "vllm")
    for index in range(6):
        hand.add(str(index), 4, 2)
    running: set[str] = set()
    while hand.flight or hand.scheduler.stats(0.0).waiting:
        plan = hand.scheduler.plan(0.0) if len(hand.flight) < 2 else None
        if plan is None:
            hand.confirm()
            continue
        hand.flight.append(plan)
        running -= {drop.id for drop in plan.drops}
        running |= {start.id for start in plan.starts}
        assert len(running) <= 2
    assert len(hand.ended) == 6


KEYS = prefix_keys(range(100), 4)
SHARING = capabilities(kv_blocks=10, block_size=4, prefix_cache=True, max_request_tokens=40)


def test_a_shared_prefix_is_counted_once() -> None:
    """16 prompt tokens are 4 blocks, of which the first 3 are shared: 4 + 1 + 1 of 10."""
    hand = Hand(SHARING, "vllm")
    for name in ("a", "b", "c"):
        hand.add(name, 16, 4, prefix=KEYS[:4])
    assert starts(hand, 2)[0] == ["a", "b"]
    hand.finish()
    hand = Hand(SHARING, "vllm")
    hand.add("a", 16, 9, prefix=KEYS[:4])
    hand.step()
    hand.add("b", 16, 4, prefix=KEYS[:4])
    hand.add("c", 16, 4, prefix=KEYS[:4])
    plan = hand.step()
    assert [start.cached for start in plan.starts] == [KEYS[:3], KEYS[:3]]
    assert [(chunk.start, chunk.tokens) for chunk in plan.chunks] == [(12, 4), (12, 4)]
    assert hand.scheduler.stats(0.0).kv_used == 5 + 1 + 1
    hand.finish()


def test_reservations_count_a_shared_prefix_once() -> None:
    """Alone each reserves 6 of 10 blocks; sharing 3, two reserve 9."""
    hand = Hand(SHARING, "tgi")
    hand.add("a", 16, 8, prefix=KEYS[:4])
    hand.step()
    hand.add("b", 16, 8, prefix=KEYS[:4])
    assert starts(hand, 1) == [["b"]]
    hand.finish()
    assert hand.scheduler.stats(0.0).evictions == 0
    hand = Hand(SHARING, "tgi")
    hand.add("a", 16, 8)
    hand.step()
    hand.add("b", 16, 8)
    assert starts(hand, 1) == [[]]


def test_idle_blocks_are_reused_and_given_up_when_needed() -> None:
    hand = Hand(SHARING, "vllm")
    hand.add("a", 16, 2, prefix=KEYS[:4])
    hand.finish()
    assert hand.scheduler.stats(0.0).kv_idle == 4
    hand.add("again", 16, 2, prefix=KEYS[:4])
    plan = hand.step()
    assert plan.starts[0].cached == KEYS[:3]
    hand.finish()
    hand.add("other", 32, 2)
    plan = hand.step()
    assert set(plan.forget) == {KEYS[3], KEYS[2]}, "8 of 10 blocks: two must go, leaves first"
    assert hand.step().forget == (KEYS[1],), "its 33rd token needs a ninth block"
    hand.finish()
    assert hand.scheduler.stats(0.0).kv_idle == 1


def test_blocks_of_a_stopped_request_stay_behind_for_the_next_turn() -> None:
    hand = Hand(SHARING, "vllm")
    hand.add("turn 1", 8, 20, prefix=KEYS[:2])
    for _ in range(8):
        hand.step()
    hand.plan()
    hand.confirm(stop={"turn 1": KEYS[:4]})
    drop = hand.step().drops[0]
    assert drop.publish == ((2, KEYS[2]), (3, KEYS[3]))
    hand.add("turn 2", 18, 2, prefix=KEYS[:4])
    assert hand.step().starts[0].cached == KEYS[:4]
    hand.finish()


loads = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 40)),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["fcfs", "priority"])
@given(load=loads, depth=st.integers(1, 2), budget=st.sampled_from([0, 5]))
@settings(max_examples=25)
def test_under_a_finite_load_every_request_finishes(
    name: str, order: str, load: list[tuple[int, int, int, int]], depth: int, budget: int
) -> None:
    """Even if the largest request needs all the memory there is."""
    machine = capabilities(
        kv_blocks=15, block_size=4, max_batch=8, max_request_tokens=61, depth=depth
    )
    jobs = [
        Job((3,) * prompt, cap, length, arrival, priority=length % 3)
        for prompt, cap, length, arrival in load
    ]
    made = presets.build(name, seed=1, order=order, token_budget=budget)
    outcome = run(jobs, machine, made, max_steps=20_000)
    reasons = {end.reason for end in outcome.ended.values()}
    assert reasons <= {FinishReason.STOP, FinishReason.LENGTH}
    assert len(outcome.ended) == len(jobs)


def test_the_same_seed_gives_the_same_plans_and_another_gives_others() -> None:
    jobs = [Job((1,) * (5 + i % 7), 40, 10 + (i * 7) % 25, i // 3) for i in range(40)]
    machine = capabilities(kv_blocks=150, block_size=1)
    plans = [
        run(
            jobs, machine, presets.build("past-future", seed=seed, window=20, cold_start=5)
        ).engine.plans
        for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_who_was_refused_is_asked_again_once_a_block_can_be_shared() -> None:
    """``b`` fits beside ``a`` only with its prompt in common, which is there after a step."""
    machine = capabilities(
        kv_blocks=20, block_size=4, max_request_tokens=80, max_step_tokens=60, prefix_cache=True
    )
    prompt = tuple(range(49))
    keys = tuple(prefix_keys(prompt, 4))
    hand = Hand(machine, "vllm")
    hand.add("a", 49, 20, prefix=keys)
    hand.add("b", 49, 20, prefix=keys)
    # Its own prompt would take 13 blocks, and 7 are left.
    assert starts(hand, 2) == [["a"], ["b"]]


@pytest.mark.parametrize("order", ["fcfs", "shortest-prefill"])
def test_memory_of_those_before_it_in_the_pass_is_not_free(order: str) -> None:
    policy = replace(presets.build("vllm", order=order), admit=Asked())
    hand = Hand(capabilities(kv_blocks=12, block_size=1, max_request_tokens=12), policy)
    for name, prompt in (("a", 3), ("b", 4), ("c", 6)):
        hand.add(name, prompt, 1)
    assert starts(hand, 1) == [["a", "b"]]
    assert "KV memory: 6 blocks needed, 5 free" in (hand.scheduler.explain("c") or "")


def test_cached_blocks_that_make_room_for_another_in_the_pass_are_gone() -> None:
    """``b`` needs the memory of what ``a`` left behind, so ``c`` cannot begin with it."""
    machine = capabilities(
        kv_blocks=10, block_size=4, max_request_tokens=40, max_step_tokens=60, prefix_cache=True
    )
    keys = {name: tuple(prefix_keys(tuple(name.encode() * 16), 4)) for name in "ax"}
    hand = Hand(machine, asked(Asked()))
    for name in "ax":
        hand.add(name, 16, 1, prefix=keys[name])
        hand.step()
    hand.add("b", 23, 1)
    hand.add("c", 5, 1, prefix=keys["a"][:1])
    plan = hand.step()
    assert [(start.id, len(start.cached)) for start in plan.starts] == [("b", 0), ("c", 0)]


def test_a_policy_that_breaks_leaves_the_books_in_order() -> None:
    class Broken(Asked):
        def judge(self, view: Snapshot) -> Judge:
            answer = Asked.judge(self, view)

            def break_at_b(candidate: Candidate) -> Answer:
                if candidate.request.id == "b":
                    raise ZeroDivisionError
                return answer(candidate)

            return break_at_b

    hand = Hand(capabilities(), asked(Broken()))
    hand.add("a", 3, 4)
    hand.add("b", 3, 4)
    with pytest.raises(ZeroDivisionError):
        hand.plan()
    hand.scheduler.check()


@pytest.mark.parametrize("order", ["fcfs", "shortest-prefill"])
def test_a_static_batch_enters_whole_where_its_prompts_fill_the_step(order: str) -> None:
    machine = capabilities(kv_blocks=200, max_batch=8, max_step_tokens=40)
    hand = Hand(machine, presets.build("sls", order=order))
    for name in "abcdefgh":
        hand.add(name, 10, 3)
    first, second, third = (hand.step() for _ in range(3))
    assert [start.id for start in first.starts] == list("abcdefgh")
    assert [chunk.id for chunk in first.chunks] == list("abcd")
    assert (second.decode, [chunk.id for chunk in second.chunks]) == ((), list("efgh"))
    assert len(third.decode) == 8


def test_a_place_that_an_evicted_request_leaves_wakes_who_waits_for_it() -> None:
    """``a`` is evicted from a plan in flight, and cancelled: it holds no memory, but a place."""
    hand = Hand(capabilities(max_batch=1, depth=2), "vllm")
    hand.add("a", 4, 9)
    hand.add("b", 4, 9)
    hand.step()
    hand.plan()
    books = hand.scheduler._books
    drop = books.evict(books.entries["a"], 0.0)
    books.leaving.drops.append(drop)
    hand.scheduler.cancel("a")
    assert [start.id for start in hand.plan().starts] == []
    assert hand.scheduler.explain("b") == "waiting: the batch is full: 1 of 1 places taken"
    hand.confirm()
    assert [start.id for start in hand.plan().starts] == ["b"]
