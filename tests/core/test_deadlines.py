"""Promises: when they are due, and what keep, demote and expire do about them."""

from __future__ import annotations

import pytest

from penstock.core.deadlines import Deadlines, Miss, Promise
from penstock.core.entry import Entry
from penstock.core.lifecycle import State
from penstock.core.types import SLO, FinishReason, OnMiss, Request
from tests.core.drive import capabilities
from tests.core.hand import Hand


def entry(
    slo: SLO, *, arrival: float = 10.0, seq: int = 0, on_miss: OnMiss = OnMiss.EXPIRE
) -> Entry:
    request = Request(f"r{seq}", 5, 50, arrival, slo=slo, on_miss=on_miss)
    return Entry(request, seq, (arrival,), arrival)


def names(misses: list[Miss]) -> list[tuple[str, Promise]]:
    return [(miss.entry.request.id, miss.promise) for miss in misses]


def test_promises_count_from_the_arrival_and_are_told_once() -> None:
    deadlines = Deadlines()
    deadlines.arrived(entry(SLO(ttft=2.0, e2e=5.0)))
    assert deadlines.due(11.999) == []
    assert names(deadlines.due(12.0)) == [("r0", Promise.TTFT)]
    assert deadlines.due(14.9) == []
    late = deadlines.due(15.25)
    assert names(late) == [("r0", Promise.E2E)]
    assert late[0].detail == "the e2e promise of 5 s was missed 0.250 s ago"
    assert deadlines.due(99.0) == []


def test_they_come_in_the_order_of_their_time() -> None:
    deadlines = Deadlines()
    for seq, ttft in enumerate((3.0, 1.0, 2.0, 1.0)):
        deadlines.arrived(entry(SLO(ttft=ttft), seq=seq))
    assert [name for name, _ in names(deadlines.due(99.0))] == ["r1", "r3", "r2", "r0"]


def test_those_who_have_ended_are_not_kept_until_their_deadline() -> None:
    deadlines = Deadlines()
    open_ = [entry(SLO(e2e=3600.0), seq=seq) for seq in range(100)]
    for one in open_:
        deadlines.arrived(one)
    for seq in range(100, 5000):
        ended = entry(SLO(e2e=3600.0), seq=seq)
        deadlines.arrived(ended)
        ended.state = State.ENDED
    assert len(deadlines._heap) <= 2 * 100 + 1
    assert [name for name, _ in names(deadlines.due(1e9))] == [f"r{one.seq}" for one in open_]


def test_keep_sets_no_deadlines() -> None:
    deadlines = Deadlines()
    kept = entry(SLO(ttft=1.0, gap=1.0, e2e=1.0), on_miss=OnMiss.KEEP)
    deadlines.arrived(kept)
    kept.state, kept.generated, kept.evictions = State.EVICTED, 3, 1
    kept.latest_at = 10.0
    deadlines.evicted(kept)
    assert deadlines.due(1e9) == []


def test_a_first_token_in_time_settles_ttft_but_not_e2e() -> None:
    deadlines = Deadlines()
    served = entry(SLO(ttft=1.0, e2e=2.0))
    deadlines.arrived(served)
    served.state, served.sampled_in = State.DECODE, 1
    assert names(deadlines.due(99.0)) == [("r0", Promise.E2E)]


def test_whoever_ended_misses_nothing() -> None:
    deadlines = Deadlines()
    gone = entry(SLO(ttft=1.0, e2e=2.0))
    deadlines.arrived(gone)
    gone.state = State.ENDED
    assert deadlines.due(99.0) == []


@pytest.mark.parametrize(
    ("state", "evictions", "missed"),
    [(State.EVICTED, 1, True), (State.DECODE, 1, False), (State.EVICTED, 2, False)],
)
def test_the_gap_is_watched_during_one_eviction(
    state: State, evictions: int, *, missed: bool
) -> None:
    deadlines = Deadlines()
    one = entry(SLO(gap=0.5))
    one.state, one.generated, one.evictions = State.EVICTED, 3, 1
    one.latest_at = 20.0
    deadlines.evicted(one)
    one.state, one.evictions = state, evictions
    assert deadlines.due(20.4) == []
    assert names(deadlines.due(20.5)) == ([("r0", Promise.GAP)] if missed else [])


def test_without_a_token_there_is_no_gap() -> None:
    deadlines = Deadlines()
    one = entry(SLO(gap=0.5))
    one.state, one.evictions = State.EVICTED, 1
    one.latest_at = 20.0
    deadlines.evicted(one)
    assert deadlines.due(99.0) == []


SMALL = capabilities(kv_blocks=12, block_size=1, max_request_tokens=12, max_batch=4)


def test_expire_ends_a_waiting_request_with_the_reason() -> None:
    hand = Hand(SMALL, "tgi")
    hand.add("first", 6, 6)
    hand.step()
    hand.add("late", 6, 6, slo=SLO(ttft=1.0), on_miss=OnMiss.EXPIRE)
    hand.now = 1.5
    hand.step()
    ended = hand.ended["late"]
    assert (ended.reason, ended.output_tokens) == (FinishReason.EXPIRED, 0)
    assert ended.detail == "the ttft promise of 1 s was missed 0.500 s ago"
    assert hand.scheduler.take_forgotten() == ("late",)


def test_expire_ends_a_running_request_and_gives_its_memory_back() -> None:
    hand = Hand(SMALL, "vllm")
    hand.add("a", 4, 8, slo=SLO(e2e=1.0), on_miss=OnMiss.EXPIRE)
    hand.step()
    hand.step()
    hand.now = 1.0
    plan = hand.step()
    assert [drop.id for drop in plan.drops] == ["a"]
    assert plan.drops[0].final
    assert plan.decode == ()
    assert (hand.ended["a"].reason, hand.ended["a"].output_tokens) == (FinishReason.EXPIRED, 2)
    assert hand.scheduler.stats(1.0).kv_used == 0


def test_two_promises_missed_at_once_end_a_request_once() -> None:
    hand = Hand(SMALL, "vllm")
    hand.add("a", 4, 8, slo=SLO(ttft=1.0, e2e=1.0), on_miss=OnMiss.EXPIRE)
    hand.now = 2.0
    assert hand.scheduler.plan(2.0) is None
    assert [end.reason for end in hand.scheduler.take_ended()] == [FinishReason.EXPIRED]


@pytest.mark.parametrize(
    ("on_miss", "next_up"), [(OnMiss.KEEP, "late"), (OnMiss.DEMOTE, "in time")]
)
def test_demoted_requests_come_after_those_who_can_be_in_time(
    on_miss: OnMiss, next_up: str
) -> None:
    hand = Hand(SMALL, "tgi")
    hand.add("first", 6, 6)
    hand.step()
    hand.add("late", 6, 6, slo=SLO(ttft=1.0), on_miss=on_miss)
    hand.now = 0.5
    hand.add("in time", 6, 6, slo=SLO(ttft=9.0), on_miss=on_miss)
    hand.now = 1.5
    hand.step(stop=["first"])
    assert [start.id for start in hand.step().starts] == [next_up]
    hand.finish()
    assert {end.reason for end in hand.ended.values()} == {FinishReason.STOP, FinishReason.LENGTH}


def test_an_evicted_request_that_waits_longer_than_its_gap_expires() -> None:
    hand = Hand(SMALL, "vllm")
    hand.add("a", 5, 7)
    hand.add("b", 5, 7, slo=SLO(gap=1.0), on_miss=OnMiss.EXPIRE)
    while hand.scheduler.stats(0.0).evictions == 0:
        hand.step()
    tokens = hand.tokens["b"]
    hand.now = 0.9
    hand.step()
    assert "b" not in hand.ended
    hand.now = 1.0
    hand.step()
    ended = hand.ended["b"]
    assert (ended.reason, ended.evictions) == (FinishReason.EXPIRED, 1)
    assert ended.output_tokens == tokens
    assert "gap promise of 1 s" in ended.detail


def test_the_gap_counts_from_the_last_token_over_several_evictions() -> None:
    """It was evicted at 20 with its token of then, admitted, and evicted again in its prefill."""
    hand = Hand(SMALL, "vllm")
    hand.add("a", 4, 8, slo=SLO(gap=0.5), on_miss=OnMiss.EXPIRE)
    hand.step()
    hand.step()
    books = hand.scheduler._books
    entry = books.entries["a"]
    books.evict(entry, 20.0)
    books.queue.remove(entry)
    books.start([(entry, 6)])
    books.evict(entry, 20.4)
    assert books.deadlines.next == 20.5
