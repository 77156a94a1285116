"""The dispatcher: whatever happens to instances, no request is lost, doubled, or cut too late."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.dispatcher import Batch, Dispatcher
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.slices import SliceCost
from penstock.core.policies.back_pressure import BackPressure, Waiting
from penstock.core.policies.dispatch import Interval
from penstock.core.policies.fleets import FLEETS, PLACES, build_fleet
from penstock.core.types import FinishReason, Request, Role

FORM = (1e-6, 1e-3, 1e-6, 1e-2)


def cost(kv_tokens: int, slice_tokens: int = 8) -> SliceCost:
    return SliceCost(Bilinear(FORM, FORM), slice_tokens, max(1, int(kv_tokens * 0.9)), 16)


def make(preset: str = "scls", place: str | None = None, **parameters: float) -> Dispatcher:
    if preset in FLEETS:
        small = {"slice_tokens": 8, "batch_size": 4}
        taken = FLEETS[preset].parameters
        parameters = {k: v for k, v in small.items() if k in taken} | parameters
    return Dispatcher(build_fleet(preset, place=place, parameters=parameters).dispatch, cost)


def request(name: str, prompt: int = 10, cap: int = 20, arrival: float = 0.0) -> Request:
    return Request(name, prompt, cap, arrival)


class Machine(RuleBasedStateMachine):
    """Random histories of arrivals, slices, losses and cancellations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.names = 0
        self.open: dict[str, Request] = {}
        self.done: set[str] = set()
        self.at: dict[str, tuple[int, Request]] = {}
        self.known: dict[str, int] = {}
        self.up: dict[int, Role] = {}
        self.in_hand: set[str] = set()
        # Where KV goes ahead, by slice, and where requests with it must then go.
        self.bound: dict[str, int] = {}
        self.expected: dict[str, int] = {}
        self.started = False

    @precondition(lambda self: not self.started)
    @rule(
        preset=st.sampled_from([*FLEETS, "past-future"]),
        place=st.sampled_from([*PLACES, None]),
        roles=st.booleans(),
        factor=st.sampled_from([None, 0.2, 1.0]),
    )
    def start(self, preset: str, place: str | None, *, roles: bool, factor: float | None) -> None:
        self.roles = roles and preset not in FLEETS
        if preset == "past-future" and place == "max-min":
            place = None
        self.dispatcher = make(preset, place)
        if self.roles and factor is not None:
            held = BackPressure(np.random.default_rng(1), factor)
            policy = replace(self.dispatcher.policy, back_pressure=held)
            self.dispatcher = Dispatcher(policy, cost)
        self.started = True

    @precondition(lambda self: self.started)
    @rule(prompt=st.integers(1, 50), cap=st.integers(1, 40), wait=st.floats(0, 2))
    def arrive(self, prompt: int, cap: int, wait: float) -> None:
        self.now += wait
        self.names += 1
        new = request(f"r{self.names}", prompt, cap, self.now)
        self.dispatcher.add(new, self.now)
        self.open[new.id] = new
        self.known[new.id] = 0

    @precondition(lambda self: self.started)
    @rule(number=st.integers(0, 3), role=st.sampled_from(Role))
    def join_or_lose(self, number: int, role: Role) -> None:
        if number not in self.up:
            role = role if self.roles else Role.MIXED
            self.dispatcher.join(number, 400, role)
            self.up[number] = role
            return
        del self.up[number]
        for kept in (self.bound, self.expected):
            for name in [name for name, where in kept.items() if where == number]:
                del kept[name]
        lost = {
            self.dispatcher.whole(name): (name, at)
            for name, (at, _) in self.at.items()
            if at == number
        }
        back = self.dispatcher.lose(number, self.now)
        assert sorted(back) == sorted(name for name in lost if name)
        for name, _ in lost.values():
            del self.at[name]

    @precondition(lambda self: self.started)
    @rule()
    def dispatch(self) -> None:
        due = self.dispatcher.due
        if due == math.inf:
            assert not self.dispatcher.dispatch(self.now)
            return
        self.now = max(self.now, due)
        pooled = self.dispatcher.pooled
        batches = self.dispatcher.dispatch(self.now)
        assert sum(len(batch.requests) for batch in batches) + self.dispatcher.pooled == pooled
        roles = set(self.up.values())
        if not self.roles:
            assert self.dispatcher.pooled == 0
        if roles & {Role.DECODE, Role.MIXED}:
            # Back-pressure holds prompts only.
            sent = {self.dispatcher.whole(part.id) for b in batches for part in b.requests}
            assert self.in_hand <= sent
        for batch in batches:
            self.take(batch)
        if self.dispatcher.pooled:
            assert self.dispatcher.due == math.inf, "nobody polls for those that cannot be sent"
            ahead = len(self.at)
            missing = not roles & {Role.PREFILL, Role.MIXED}
            assert ahead or missing or self.in_hand, "with nothing on its way, one may begin"

    def take(self, batch: Batch) -> None:
        assert batch.instance in self.up
        for part in batch.requests:
            whole = self.dispatcher.whole(part.id)
            assert whole is not None
            original = self.open[whole]
            assert part.generated == self.known[whole]
            assert part.generated < part.cap <= original.cap
            role = self.up[batch.instance]
            had = part.prompt_tokens + part.generated - 1
            assert part.computed == (had if whole in self.in_hand else 0)
            assert role is not (Role.PREFILL if part.computed else Role.DECODE)
            if role is Role.PREFILL:
                assert part.cap == part.generated + 1
            assert self.dispatcher.hands_over(part.id) == (
                role is Role.PREFILL and part.cap < original.cap
            )
            if part.computed:
                assert part.first_token is not None
            if part.computed and self.expected.get(whole) in self.up:
                assert batch.instance == self.expected[whole]
            self.expected.pop(whole, None)
            self.in_hand.discard(whole)
            assert part.id not in self.at
            self.at[part.id] = (batch.instance, part)

    @precondition(lambda self: self.started and self.at)
    @rule(data=st.data())
    def end_slice(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.at)))
        _, part = self.at.pop(name)
        whole = self.dispatcher.whole(name)
        assert whole is not None
        reason = data.draw(st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]))
        got = part.cap
        if reason is FinishReason.STOP:
            got = data.draw(st.integers(part.generated + 1, part.cap))
        kv = self.dispatcher.hands_over(name) and reason is FinishReason.LENGTH
        kv = kv and data.draw(st.booleans())
        if kv and name in self.bound:
            self.expected[whole] = self.bound[name]
        ended = self.dispatcher.ended(name, got, reason, self.now, kv=kv)
        if kv:
            self.in_hand.add(whole)
        self.known[whole] = got
        if reason is FinishReason.STOP or got == self.open[whole].cap:
            assert ended == whole
            del self.open[whole]
            self.done.add(whole)
        else:
            assert ended is None

    @precondition(lambda self: self.started)
    @rule()
    def move(self) -> None:
        for number, name in self.dispatcher.moves(self.now):
            assert self.at[name][0] == number
            assert self.dispatcher.policy.move is not None
            whole = self.dispatcher.whole(name)
            assert whole is not None
            del self.at[name]
            had = self.known[whole]
            assert self.dispatcher.ended(name, had, FinishReason.CANCELLED, self.now) is None

    @precondition(lambda self: self.started and self.open)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        where = self.dispatcher.withdraw(name)
        del self.open[name]
        self.in_hand.discard(name)
        if where is not None:
            number, slice_id = where
            assert self.at.pop(slice_id)[0] == number

    @precondition(lambda self: self.started and self.at)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.at)))
        part = self.at[name][1]
        whole = self.dispatcher.whole(name)
        assert whole is not None
        had = self.known[whole]
        more = data.draw(st.integers(had, max(had, part.cap - 1)))
        self.dispatcher.progress(name, more)
        self.known[whole] = more

    @precondition(lambda self: self.started and self.in_hand)
    @rule(data=st.data())
    def lose_kv(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.in_hand)))
        self.dispatcher.kv_lost(name)
        self.in_hand.remove(name)

    @precondition(lambda self: self.started and self.at)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        """KV of a prompt goes ahead: to one and the same instance, as long as that is there."""
        able = [name for name in sorted(self.at) if self.dispatcher.hands_over(name)]
        if not able:
            return
        name = data.draw(st.sampled_from(able))
        where = self.dispatcher.bind(name)
        decode = {number for number, role in self.up.items() if role is Role.DECODE}
        assert (where in decode) if decode else where is None
        assert self.dispatcher.bind(name) == where
        if where is not None:
            self.bound[name] = where

    @precondition(lambda self: self.started and self.at)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.at)))
        self.dispatcher.refused(name, self.now)
        del self.at[name]

    @invariant()
    def keeps_its_books(self) -> None:
        if self.started:
            self.dispatcher.check()
            assert self.dispatcher.open_requests == len(self.open)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def disaggregated(factor: float | None = None) -> Dispatcher:
    dispatcher = make("past-future")
    if factor is not None:
        held = BackPressure(np.random.default_rng(1), factor)
        dispatcher = Dispatcher(replace(dispatcher.policy, back_pressure=held))
    dispatcher.join(0, 1000, Role.PREFILL)
    dispatcher.join(1, 100, Role.DECODE)
    return dispatcher


def test_a_request_goes_from_prefill_to_decode_and_back_if_its_kv_is_lost() -> None:
    dispatcher = disaggregated()
    dispatcher.add(request("r", prompt=10, cap=20), 0.0)
    (first,) = dispatcher.dispatch(0.0)
    assert (first.instance, first.requests[0].cap) == (0, 1)
    dispatcher.ended("r", 1, FinishReason.LENGTH, 2.0, kv=True)
    (second,) = dispatcher.dispatch(2.0)
    (part,) = second.requests
    assert (second.instance, part.computed, part.generated, part.cap) == (1, 10, 1, 20)
    assert part.first_token == 2.0
    dispatcher.progress(part.id, 7)
    assert dispatcher.lose(1, 3.0) == ("r",)
    (third,) = dispatcher.dispatch(3.0)
    (again,) = third.requests
    assert (third.instance, again.computed, again.generated, again.cap) == (0, 0, 7, 8)
    dispatcher.ended(again.id, 8, FinishReason.LENGTH, 4.0, kv=True)
    assert dispatcher.dispatch(4.0) == []
    dispatcher.join(2, 100, Role.DECODE)
    (fourth,) = dispatcher.dispatch(5.0)
    assert (fourth.instance, fourth.requests[0].computed) == (2, 17)
    assert fourth.requests[0].first_token == 2.0


def test_prompts_wait_until_decode_instances_will_have_room() -> None:
    dispatcher = disaggregated(factor=1.0)
    for index in range(4):
        # Nothing has ended, so each is forecast at its cap: 30 tokens.
        dispatcher.add(request(f"r{index}", prompt=10, cap=20), 0.0)
    sent = [part.id for batch in dispatcher.dispatch(0.0) for part in batch.requests]
    assert sent == ["r0", "r1", "r2"]
    assert dispatcher.due == math.inf
    dispatcher.ended("r0", 1, FinishReason.STOP, 1.0)
    assert dispatcher.due <= 1.0
    assert [part.id for batch in dispatcher.dispatch(1.0) for part in batch.requests] == ["r3"]


def test_prompts_wait_for_room_while_every_decode_instance_is_gone() -> None:
    dispatcher = disaggregated(factor=1.0)
    dispatcher.lose(1, 0.0)
    for index in range(60):
        dispatcher.add(request(f"r{index}", prompt=10, cap=20), 0.0)
    # As many as those 100 tokens would have taken, and no more when their KV is in hand.
    sent = [part.id for batch in dispatcher.dispatch(0.0) for part in batch.requests]
    assert sent == ["r0", "r1", "r2"]
    for name in sent:
        dispatcher.ended(name, 1, FinishReason.LENGTH, 1.0, kv=True)
    assert dispatcher.dispatch(1.0) == []
    dispatcher.join(2, 200, Role.DECODE)
    parts = [part for batch in dispatcher.dispatch(2.0) for part in batch.requests]
    assert [part.computed for part in parts] == [10, 10, 10, 0, 0, 0]


def test_the_first_prompt_begins_before_any_decode_instance_is_there() -> None:
    dispatcher = make("past-future")
    held = BackPressure(np.random.default_rng(1), 1.0)
    dispatcher = Dispatcher(replace(dispatcher.policy, back_pressure=held))
    dispatcher.join(0, 1000, Role.PREFILL)
    for index in range(4):
        dispatcher.add(request(f"r{index}", prompt=10, cap=20), 0.0)
    sent = [part.id for batch in dispatcher.dispatch(0.0) for part in batch.requests]
    assert sent == ["r0"]


def test_those_that_wait_begin_in_time_and_the_late_are_not_forgotten() -> None:
    held = BackPressure(np.random.default_rng(1), 1.0)
    late = Waiting(0.0, 1.0, (5, 0, 5))
    later = Waiting(1.0, 1.0, (4, 0, 5))
    fresh = [Waiting(9.5, 1.0, (size, 0, 5)) for size in (30, 10, 20)]
    queue = [late, *fresh, later]
    assert held.admitted(queue, [], 1000, 10.0) == [2, 3, 1, 0, 4]
    # With room for one at a time, one in ten is the oldest late one.
    turns = [held.admitted(queue, [], 1, 10.0)[0] for _ in range(30)]
    assert turns.count(0) == 3
    assert turns.count(2) == 27


def test_a_factor_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="back_pressure is 0"):
        BackPressure(np.random.default_rng(0), 0.0)


def test_max_min_gives_the_next_batch_to_the_least_loaded() -> None:
    dispatcher = make("scls", interval=0.0, interval_share=0.0)
    dispatcher.join(0, 40)
    dispatcher.join(1, 40)
    for index in range(6):
        dispatcher.add(request(f"r{index}", prompt=10 + index), 0.0)
    batches = dispatcher.dispatch(0.0)
    assert [batch.seconds for batch in batches] == sorted(
        (batch.seconds for batch in batches), reverse=True
    )
    loads = [view.load for view in dispatcher.instances]
    assert max(loads) - min(loads) <= max(batch.seconds for batch in batches)
    for batch in batches:
        for part in batch.requests:
            dispatcher.ended(part.id, 8, FinishReason.LENGTH, 1.0)
    assert [view.load for view in dispatcher.instances] == [0.0, 0.0]
    assert dispatcher.pooled == 6


def test_the_interval_follows_the_least_load() -> None:
    assert Interval(3.0, 0.5).seconds([20.0, 8.0]) == 4.0
    assert Interval(3.0, 0.5).seconds([20.0, 2.0]) == 3.0
    assert Interval(3.0).seconds([]) == 3.0
    dispatcher = make("scls", interval=3.0)
    dispatcher.join(0, 400)
    dispatcher.add(request("a"), 1.0)
    assert dispatcher.due == 1.0
    dispatcher.dispatch(1.0)
    dispatcher.add(request("b"), 1.5)
    assert dispatcher.due == 4.0


def test_what_a_lost_instance_held_goes_first() -> None:
    dispatcher = make("past-future", "round-robin")
    dispatcher.join(0, 400)
    dispatcher.add(request("a"), 0.0)
    dispatcher.dispatch(0.0)
    dispatcher.progress("a", 3)
    dispatcher.add(request("b"), 1.0)
    assert dispatcher.lose(0, 2.0) == ("a",)
    assert dispatcher.due == math.inf
    dispatcher.join(1, 400)
    sent = [part for batch in dispatcher.dispatch(2.0) for part in batch.requests]
    assert [(part.id, part.generated) for part in sent] == [("a~1", 3), ("b", 0)]


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("nobody", {}, "preset 'nobody' is unknown"),
        ("vllm", {"place": "nowhere"}, "place 'nowhere' is unknown"),
        ("vllm", {"place": "max-min"}, "place 'max-min' needs a preset with slices"),
        ("scls", {"parameters": {"window": 3}}, "preset 'scls' has no parameter 'window'"),
        ("scls", {"parameters": {"batch_size": 3}}, "preset 'scls' has no parameter 'batch_size'"),
        ("scls-kv", {"parameters": {"interval": 3}}, "it has: slice_tokens$"),
        ("scls", {"parameters": {"slice_tokens": 0}}, "slice_tokens is 0"),
        ("scls", {"parameters": {"slice_tokens": 1.5}}, "slice_tokens is 1.5"),
        ("scls", {"parameters": {"safety": 2.0}}, "safety is 2.0"),
        ("scls", {"parameters": {"interval": -1.0}}, "interval.least is -1.0"),
    ],
)
def test_bad_settings_are_named(preset: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_fleet(preset, **options)  # type: ignore[arg-type]


def test_slices_need_prices() -> None:
    with pytest.raises(ValueError, match="prices"):
        Dispatcher(build_fleet("scls").dispatch)
