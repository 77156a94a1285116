"""When a backend is left alone, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from penstock.router.circuit import Circuit, State


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit(3, 2.0, 5.0, clock)


def test_it_opens_after_failures_in_a_row(circuit: Circuit, clock: Clock) -> None:
    assert [circuit.failure(), circuit.failure()] == [False, False]
    circuit.success()
    assert [circuit.failure(), circuit.failure(), circuit.failure()] == [False, False, True]
    assert circuit.state is State.OPEN
    assert circuit.due == clock.now + 2
    assert not circuit.available
    clock.now += 1000
    assert not circuit.available  # a probe opens it, not the time


def test_it_rests_after_each_failure(circuit: Circuit, clock: Clock) -> None:
    circuit.failure()
    assert not circuit.available
    first = circuit.rest_until - clock.now
    clock.now += first
    assert circuit.available
    circuit.failure()
    assert circuit.rest_until - clock.now > first


def test_a_rest_that_was_asked_for_is_no_failure(circuit: Circuit, clock: Clock) -> None:
    for _ in range(10):
        circuit.busy(4)
        circuit.busy(1)
    assert (circuit.state, circuit.failures) == (State.CLOSED, 0)
    clock.now += 3.9
    assert not circuit.available
    clock.now += 0.2
    assert circuit.available
    circuit.busy(3600)
    assert circuit.free_at == clock.now + 5  # no header takes a backend away for an hour


def test_a_rest_is_never_nothing(circuit: Circuit, clock: Clock) -> None:
    circuit.busy(0)
    assert not circuit.available
    clock.now += 0.1
    assert circuit.available


def open_again(circuit: Circuit) -> None:
    while not circuit.failure():
        pass


def test_backoff_doubles_until_a_slice_ends_well(circuit: Circuit, clock: Clock) -> None:
    waits = []
    open_again(circuit)
    for ok in (False, True):
        waits.append(circuit.due - clock.now)
        circuit.probe()
        assert circuit.state is State.HALF_OPEN
        assert not circuit.available
        circuit.probed(ok=ok)
    assert circuit.available
    open_again(circuit)  # passes probes, fails slices
    waits.append(circuit.due - clock.now)
    circuit.probe()
    circuit.probed(ok=True)
    circuit.success()
    open_again(circuit)
    waits.append(circuit.due - clock.now)
    assert waits == [2, 4, 5, 2]


def test_late_news_do_not_change_an_open_circuit(circuit: Circuit) -> None:
    open_again(circuit)
    due = circuit.due
    assert circuit.failure() is False
    circuit.success()
    assert (circuit.state, circuit.due) == (State.OPEN, due)
