"""Past-Future admission against its pseudo-code, and the rules that its paper insists on."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.memory import blocks_for
from penstock.core.policies.admit.past_future import PastFuture, scenario_count
from penstock.core.policies.base import Admit, Defer
from penstock.core.snapshot import Candidate
from penstock.core.types import Ended, FinishReason
from tests.core.test_lengths import literal
from tests.core.test_occupancy import walked
from tests.core.views import Row, candidate, snapshot


def make(
    past: list[int], *, seed: int = 0, reserve: float = 0.0, window: int | None = None
) -> PastFuture:
    """A policy whose past is exactly this."""
    policy = PastFuture(
        np.random.default_rng(seed), window=window or max(2, len(past)), reserve=reserve
    )
    for length in past:
        policy.observe(ended(length))
    return policy


def ended(length: int, reason: FinishReason = FinishReason.STOP) -> Ended:
    return Ended("x", reason, length, 0)


def literal_pass(
    past: list[int],
    rows: list[Row],
    queue: list[Candidate],
    rng: np.random.Generator,
    limit: float,
    block_size: int,
    fixed: int,
    overlap: int,
) -> list[bool]:
    """The schedule pass as the paper has it, within caps; ends with the first refusal."""
    count = 1 if not rows else min(5, floor(200 / len(rows)) + 1)
    uniform = rng.random((count, len(rows))).tolist()
    lists: list[list[tuple[int, int]]] = []
    for k in range(count):
        lists.append([])
        for row, u in zip(rows, uniform[k], strict=True):
            drawn = literal(past, row.generated, row.cap, u)
            tokens = row.prompt + row.generated - row.shared
            lists[k].append((tokens, max(0, drawn - row.generated - 1) + row.lag + overlap))
    answers = []
    most = fixed + sum(blocks_for(row.prompt + row.cap, block_size) for row in rows)
    for waiting in queue:
        request, generated = waiting.request, waiting.generated
        most += waiting.most_blocks
        for k, u in enumerate(rng.random(count).tolist()):
            drawn = min(request.cap, max(generated, sorted(past)[floor(u * len(past))]))
            tokens = request.prompt_tokens + generated - waiting.shared
            lists[k].append((tokens, max(0, drawn - generated - 1) + waiting.lag + overlap))
        forecast = fixed + max(walked(k, block_size) for k in lists)
        # Steps of prefill and of overlapping plans can push a forecast above what caps allow.
        answers.append(min(forecast, most) < limit)
        if not answers[-1]:
            break
    return answers


@st.composite
def running(draw: st.DrawFn, block_size: int) -> Row:
    generated = draw(st.integers(1, 30))
    prompt = draw(st.integers(1, 40))
    shared = draw(st.integers(0, (prompt - 1) // block_size)) * block_size
    lag = draw(st.sampled_from([0, 0, 0, 2]))
    return Row(prompt, generated, generated + draw(st.integers(1, 40)), shared, lag)


@st.composite
def waiting(draw: st.DrawFn, block_size: int) -> Candidate:
    generated = draw(st.sampled_from([0, 0, 5]))
    prompt = draw(st.integers(1, 40))
    return candidate(
        prompt,
        generated + draw(st.integers(1, 40)),
        generated=generated,
        shared=draw(st.integers(0, (prompt - 1) // block_size)) * block_size,
        lag=draw(st.integers(0, 2)),
        block_size=block_size,
    )


@given(
    past=st.lists(st.integers(1, 50), min_size=2, max_size=12),
    block_size=st.sampled_from([1, 4]),
    capacity=st.integers(1, 400),
    reserve=st.sampled_from([0.0, 0.03, 0.5]),
    fixed=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    overlap=st.integers(0, 2),
    data=st.data(),
)
def test_a_pass_answers_as_the_pseudo_code_does(
    past: list[int],
    block_size: int,
    capacity: int,
    reserve: float,
    fixed: tuple[int, int],
    overlap: int,
    data: st.DataObject,
) -> None:
    rows = data.draw(st.lists(running(block_size), max_size=8))
    queue = data.draw(st.lists(waiting(block_size), min_size=1, max_size=5))
    policy = make(past, seed=7, reserve=reserve)
    shared, lingering = fixed
    judge = policy.judge(
        snapshot(
            rows,
            capacity=capacity,
            block_size=block_size,
            shared=shared,
            lingering=lingering,
            overlap=overlap,
        )
    )
    answers = []
    for one in queue:
        answers.append(isinstance(judge(one), Admit))
        if not answers[-1]:
            break
    expected = literal_pass(
        past,
        rows,
        queue,
        np.random.default_rng(7),
        (1 - reserve) * capacity,
        block_size,
        shared + lingering,
        overlap,
    )
    assert answers == expected


@pytest.mark.parametrize(
    ("count", "scenarios"),
    [
        *((0, 1), (1, 5), (40, 5), (49, 5), (50, 5)),
        *((51, 4), (66, 4), (67, 3), (100, 3)),
        *((101, 2), (200, 2), (201, 1), (10_000, 1)),
    ],
)
def test_scenario_count(count: int, scenarios: int) -> None:
    """1 if none runs, else min(5, floor(200 / n) + 1)."""
    assert scenario_count(count) == scenarios


def test_the_peak_must_stay_strictly_below_the_limit() -> None:
    """A prompt of 10 with an output of 5 peaks at 14: its last token's KV is never computed."""
    for capacity, answer in ((13, Defer), (14, Defer), (15, Admit)):
        judge = make([5, 5]).judge(snapshot(capacity=capacity))
        assert isinstance(judge(candidate(10, 100)), answer)


def test_the_reserve_is_kept_free() -> None:
    for reserve, answer in ((0.25, Admit), (0.3, Defer)):
        judge = make([5, 5], reserve=reserve).judge(snapshot(capacity=20))
        assert isinstance(judge(candidate(10, 100)), answer), reserve


def test_a_deferral_gives_its_numbers() -> None:
    answer = make([5, 5], reserve=0.1).judge(snapshot(capacity=10))(candidate(10, 100))
    assert isinstance(answer, Defer)
    assert answer.reason == (
        "KV memory: the forecast peak, 14 blocks or more, is not below 9 (90% of 10)"
    )


def test_a_candidate_draws_unconditionally_and_a_running_request_does_not() -> None:
    """The past says 5; one that has 7 tokens already is taken for done, unless it is running."""
    evicted = candidate(10, 100, generated=7)
    assert isinstance(make([5, 5]).judge(snapshot(capacity=18))(evicted), Admit)
    rows = [Row(prompt=10, generated=7, cap=100)]
    refused = [
        isinstance(
            make([5, 5], seed=seed).judge(snapshot(rows, capacity=30))(candidate(5, 5)), Defer
        )
        for seed in range(40)
    ]
    assert all(refused), "five draws between 7 and 100 are not all small"


def test_no_draw_exceeds_the_cap() -> None:
    judge = make([90, 90]).judge(snapshot(capacity=21))
    assert isinstance(judge(candidate(11, 10)), Admit)


def test_the_same_seed_gives_the_same_answers_and_another_does_not() -> None:
    past = list(range(1, 60))
    rows = [Row(10, 5, 100) for _ in range(10)]

    def reasons(seed: int) -> list[object]:
        policy = make(past, seed=seed)
        return [
            policy.judge(snapshot(rows, capacity=capacity))(candidate(10, 100))
            for capacity in range(300, 500, 10)
        ]

    assert reasons(1) == reasons(1)
    assert len({str(reasons(seed)) for seed in range(4)}) > 1


def test_what_was_admitted_counts_for_the_next() -> None:
    judge = make([5, 5]).judge(snapshot(capacity=29))
    assert isinstance(judge(candidate(10, 100)), Admit)
    assert isinstance(judge(candidate(10, 100)), Admit)
    assert isinstance(judge(candidate(1, 100)), Defer)


@pytest.mark.parametrize("reason", FinishReason)
def test_only_requests_that_came_to_their_own_end_are_learned(reason: FinishReason) -> None:
    policy = PastFuture(np.random.default_rng(0), window=10, cold_start=3)
    policy.observe(ended(44, reason))
    learned = 44 in policy.history.sorted_lengths()
    assert learned == (reason in {FinishReason.STOP, FinishReason.LENGTH})


@pytest.mark.parametrize("reserve", [-0.1, 1.0, 2.0])
def test_a_reserve_out_of_range_is_named(reserve: float) -> None:
    with pytest.raises(ValueError, match=rf"reserve is {reserve}; it must be in \[0, 1\)"):
        PastFuture(np.random.default_rng(0), reserve=reserve)
