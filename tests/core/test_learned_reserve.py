"""Past-Future's forecast with a reserve that evictions move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.policies import presets
from penstock.core.policies.admit.learned_reserve import MOST, STEP, LearnedReserve
from penstock.core.policies.admit.past_future import PastFuture
from penstock.core.policies.base import ADMIT, Admit, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended, FinishReason
from tests.core.drive import Job, capabilities, run
from tests.core.views import candidate, snapshot


class Yes(PastFuture):
    """A forecast that everything fits."""

    def judge(self, view: Snapshot) -> Judge:
        del view

        def answer(candidate: Candidate) -> Answer:
            del candidate
            self.forecasts += 1
            return ADMIT

        return answer


def make(reserve: float = 0.03, evictions: float = 0.1) -> LearnedReserve:
    rng = np.random.default_rng(1)
    return LearnedReserve(rng, reserve=reserve, evictions=evictions)


def sure(reserve: float = 0.03, evictions: float = 0.1) -> LearnedReserve:
    policy = make(reserve, evictions)
    policy.forecast = Yes(policy.rng, reserve=reserve)
    return policy


def admitted(policy: LearnedReserve, *, evicted: bool, name: str = "new") -> None:
    judge = policy.judge(snapshot())
    assert isinstance(judge(candidate(10, 10, generated=5 if evicted else 0, name=name)), Admit)


def test_an_admission_after_an_eviction_moves_it_up_and_any_other_down() -> None:
    policy = sure()
    admitted(policy, evicted=True)
    assert policy.forecast.reserve == pytest.approx(0.03 + STEP * 0.9)
    admitted(policy, evicted=False)
    assert policy.forecast.reserve == pytest.approx(0.03 + STEP * 0.8)


def test_an_eviction_counts_once_whether_its_request_comes_back_or_not() -> None:
    policy = sure()
    admitted(policy, evicted=True, name="back")
    learned = policy.forecast.reserve
    policy.observe(Ended("back", FinishReason.STOP, 9, 1))
    assert policy.forecast.reserve == learned
    policy.observe(Ended("gone", FinishReason.EXPIRED, 9, 2))
    assert policy.forecast.reserve == pytest.approx(learned + 2 * STEP)
    assert not policy._known


def test_nothing_is_given_back_where_no_forecast_was_needed() -> None:
    policy = make()
    judge = policy.judge(snapshot([], capacity=10_000))
    for _ in range(100):
        assert isinstance(judge(candidate(10, 10)), Admit)
    assert policy.forecast.reserve == 0.03


def test_a_refusal_says_nothing() -> None:
    policy = make()
    judge = policy.judge(snapshot([], capacity=100))
    assert isinstance(judge(candidate(90, 500, generated=3)), Defer)
    assert policy.forecast.reserve == 0.03


def test_the_next_pass_keeps_what_was_learned_free() -> None:
    """Sixty of a hundred blocks fit under a reserve of 3 %, and not under one of a half."""
    for reserve, answer in ((0.03, Admit), (0.5, Defer)):
        judge = make(reserve).judge(snapshot([], capacity=100))
        assert isinstance(judge(candidate(50, 10)), answer)


@given(
    evicted=st.lists(st.booleans(), max_size=400),
    evictions=st.floats(0.001, 0.5),
    reserve=st.floats(0, MOST),
)
def test_the_share_of_evictions_is_bounded(
    evicted: list[bool], evictions: float, reserve: float
) -> None:
    """Whatever happens: more of them only while the reserve is at its largest."""
    policy = sure(reserve, evictions)
    most = reserve
    for number, each in enumerate(evicted):
        admitted(policy, evicted=each, name=str(number))
        most = max(most, policy.forecast.reserve)
        assert 0 <= policy.forecast.reserve <= MOST
    if most < MOST:
        assert sum(evicted) <= evictions * len(evicted) + MOST / STEP + 1e-6


def test_it_learns_lengths_and_serves_all() -> None:
    policy = presets.build("past-future-adaptive", window=8)
    jobs = [Job(tuple(range(1 + n % 7)), 20, 1 + n % 20, n) for n in range(60)]
    done = run(jobs, capabilities(kv_blocks=30, block_size=1, max_request_tokens=30), policy)
    assert all(end.reason is FinishReason.STOP for end in done.ended.values())
    assert isinstance(policy.admit, LearnedReserve)
    policy.admit.observe(Ended("more", FinishReason.STOP, 7, 0))
    assert 7 in policy.admit.forecast.history.sorted_lengths()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reserve": 0.6}, r"reserve is 0\.6; it must be in \[0, 0\.5\]"),
        ({"evictions": 0.0}, r"evictions is 0\.0; it must be above 0"),
        ({"evictions": 1.0}, r"evictions is 1\.0; it must be above 0"),
        ({"window": 1}, "window is 1"),
    ],
)
def test_bad_parameters_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        presets.build("past-future-adaptive", **changes)
