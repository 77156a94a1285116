"""The dispatcher: whatever happens to instances, no request is lost, doubled, or cut too late."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.dispatcher import Batch, Dispatcher
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.slices import SliceCost
from penstock.core.policies.dispatch import Interval
from penstock.core.policies.fleets import FLEETS, PLACES, build_fleet
from penstock.core.types import FinishReason, Request

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
        self.up: set[int] = set()
        self.started = False

    @precondition(lambda self: not self.started)
    @rule(preset=st.sampled_from([*FLEETS, "past-future"]), place=st.sampled_from([*PLACES, None]))
    def start(self, preset: str, place: str | None) -> None:
        if preset == "past-future" and place == "max-min":
            place = None
        self.dispatcher = make(preset, place)
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
    @rule(number=st.integers(0, 3))
    def join_or_lose(self, number: int) -> None:
        if number not in self.up:
            self.dispatcher.join(number, 400)
            self.up.add(number)
            return
        self.up.remove(number)
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
        assert sum(len(batch.requests) for batch in batches) == pooled
        assert self.dispatcher.pooled == 0
        for batch in batches:
            self.take(batch)

    def take(self, batch: Batch) -> None:
        assert batch.instance in self.up
        for part in batch.requests:
            whole = self.dispatcher.whole(part.id)
            assert whole is not None
            original = self.open[whole]
            assert part.generated == self.known[whole]
            assert part.generated < part.cap <= original.cap
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
        ended = self.dispatcher.ended(name, got, reason, self.now)
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

    @invariant()
    def keeps_its_books(self) -> None:
        if self.started:
            self.dispatcher.check()
            assert self.dispatcher.open_requests == len(self.open)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


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
