"""How fast the queue moves: measured while somebody waits, and only then."""

from __future__ import annotations

import pytest

from penstock.core.forecast.wait import WaitForecast
from tests.core.drive import capabilities
from tests.core.hand import Hand


def test_unknown_until_two_were_admitted() -> None:
    wait = WaitForecast()
    assert wait.rate(1.0) is None
    wait.admitted(1.0)
    assert wait.rate(5.0) is None
    wait.admitted(2.0)
    assert wait.rate(3.0) == 1.0


def test_unknown_while_no_time_has_passed() -> None:
    wait = WaitForecast()
    wait.admitted(1.0)
    wait.admitted(1.0)
    assert wait.rate(1.0) is None


def test_a_queue_that_has_stopped_is_seen_to_have_stopped() -> None:
    wait = WaitForecast()
    for second in range(10):
        wait.admitted(float(second))
    assert wait.rate(10.0) == 1.0
    assert wait.rate(100.0) == pytest.approx(0.1)


def test_only_the_window_counts() -> None:
    wait = WaitForecast(window=4)
    for second in (0.0, 1.0, 100.0, 101.0, 102.0, 103.0):
        wait.admitted(second)
    assert wait.rate(104.0) == 1.0


def test_time_in_which_nobody_waits_does_not_count() -> None:
    wait = WaitForecast()
    for second in range(10):
        wait.admitted(float(second))
    wait.emptied(10.0)
    assert wait.rate(10.0) == 1.0
    assert wait.rate(4000.0) == 1.0, "nothing moves because nobody waits"
    wait.emptied(4000.0)
    wait.waiting(4010.0)
    assert wait.rate(4010.0) == 1.0
    assert wait.rate(4020.0) == pytest.approx(0.5)
    wait.waiting(4020.0)
    assert wait.rate(4020.0) == pytest.approx(0.5)


def test_a_request_that_arrived_before_the_queue_was_seen_empty() -> None:
    """It arrived during a step, and the queue was last looked at before that step."""
    wait = WaitForecast()
    wait.admitted(0.0)
    wait.admitted(1.0)
    wait.emptied(2.0)
    wait.waiting(1.5)
    assert wait.rate(2.0) == 1.0


def test_those_who_were_evicted_do_not_count_as_the_queue_moving() -> None:
    machine = capabilities(kv_blocks=24, block_size=1, max_request_tokens=12, max_batch=4)
    hand = Hand(machine, "vllm")
    for name in "abcd":
        hand.add(name, 5, 7)
    while (plan := hand.scheduler.plan(hand.now)) is not None:
        hand.flight.append(plan)
        hand.confirm()
        hand.now += 1.0
    stats = hand.scheduler.stats(hand.now)
    assert stats.evictions > 1
    assert stats.admissions == 4 + stats.evictions
    assert stats.admission_rate is None


def test_an_idle_hour_does_not_make_the_scheduler_think_that_its_queue_stands_still() -> None:
    machine = capabilities(kv_blocks=12, block_size=1, max_request_tokens=12)
    hand = Hand(machine, "tgi")

    def burst() -> float:
        for index in range(4):
            hand.add(f"{hand.now}-{index}", 6, 6)
        while hand.scheduler.stats(hand.now).running or hand.scheduler.stats(hand.now).waiting:
            hand.now += 0.5
            if hand.scheduler.stats(hand.now).waiting:
                hand.step()
            elif (plan := hand.scheduler.plan(hand.now)) is not None:
                hand.flight.append(plan)
                hand.confirm()
        rate = hand.scheduler.stats(hand.now).admission_rate
        assert rate is not None
        return rate

    first = burst()
    hand.now += 3600.0
    hand.add("after", 6, 6)
    assert hand.scheduler.stats(hand.now).admission_rate == pytest.approx(first)
    hand.now += 0.5
    hand.step()
    hand.finish()
    assert burst() == pytest.approx(first, rel=0.5)


def test_who_waits_for_the_step_that_runs_says_nothing_of_a_queue() -> None:
    """Arrivals between two plans, each admitted by the next: there was no queue that moved."""
    hand = Hand(capabilities(kv_blocks=12, block_size=1, max_request_tokens=12), "tgi")
    for index in range(10):
        hand.add(f"quiet-{index}", 6, 2)
        hand.now += 0.01
        hand.finish()
        hand.now += 1.0
    assert hand.scheduler.stats(hand.now).admission_rate is None
    for index in range(6):
        hand.add(f"burst-{index}", 6, 6)
    while hand.scheduler.stats(hand.now).waiting:
        hand.now += 1.0
        hand.step()
    # One at a time, six steps each.
    assert hand.scheduler.stats(hand.now).admission_rate == pytest.approx(1 / 6, rel=0.35)
