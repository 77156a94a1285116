"""Oracle admission: the exact peak of what will really happen."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.policies.admit.oracle import Oracle
from penstock.core.policies.base import Admit, Defer
from penstock.core.types import Ended, FinishReason
from tests.core.drive import Job, capabilities, policy, run
from tests.core.test_occupancy import walked
from tests.core.views import Row, candidate, snapshot


def told(**lengths: int) -> Oracle:
    oracle = Oracle()
    for name, length in lengths.items():
        oracle.learn_true_length(name, length)
    return oracle


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 30)), max_size=6),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([1, 4]),
    st.integers(1, 300),
)
def test_it_admits_while_the_true_peak_fits(
    rows: list[tuple[int, int, int]],
    queue: list[tuple[int, int]],
    block_size: int,
    capacity: int,
) -> None:
    oracle = told(**{f"r{i}": generated + more for i, (_, generated, more) in enumerate(rows)})
    there = [(prompt + generated, max(0, more - 1)) for prompt, generated, more in rows]
    judge = oracle.judge(
        snapshot(
            [Row(prompt, generated, 1000) for prompt, generated, _ in rows],
            capacity=capacity,
            block_size=block_size,
        )
    )
    for index, (prompt, length) in enumerate(queue):
        name = f"q{index}"
        oracle.learn_true_length(name, length)
        joined = [*there, (prompt, length - 1)]
        fits = walked(joined, block_size) <= capacity
        answer = judge(candidate(prompt, 1000, name=name, block_size=block_size))
        assert isinstance(answer, Admit) == fits
        there = joined if fits else there


def test_filling_the_memory_to_the_last_block_is_allowed() -> None:
    assert isinstance(told(new=5).judge(snapshot(capacity=14))(candidate(10, 100)), Admit)
    refused = told(new=5).judge(snapshot(capacity=13))(candidate(10, 100))
    assert refused == Defer("KV memory: the true peak, 14 blocks or more, exceeds 13")


def test_without_being_told_it_counts_the_cap() -> None:
    assert isinstance(Oracle().judge(snapshot(capacity=19))(candidate(10, 10)), Admit)
    assert isinstance(Oracle().judge(snapshot(capacity=18))(candidate(10, 10)), Defer)


def test_an_end_is_forgotten() -> None:
    oracle = told(new=5)
    oracle.observe(Ended("new", FinishReason.STOP, 5, 0))
    assert isinstance(oracle.judge(snapshot(capacity=14))(candidate(10, 100)), Defer)


loads = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 25), st.integers(0, 20)),
    min_size=1,
    max_size=10,
)


@given(loads, st.sampled_from([1, 2, 4]), st.integers(32, 60), st.integers(1, 3))
@settings(max_examples=60)
def test_it_never_evicts_where_a_prompt_takes_one_step(
    load: list[tuple[int, int, int, int]], block_size: int, room: int, depth: int
) -> None:
    """Also where an end is known only after further steps were planned."""
    machine = capabilities(
        kv_blocks=-(-room // block_size),
        block_size=block_size,
        max_request_tokens=32,
        max_step_tokens=500,
        depth=depth,
    )
    jobs = [Job((7,) * prompt, cap, length, at) for prompt, cap, length, at in load]
    outcome = run(jobs, machine, policy("oracle"))
    assert outcome.scheduler.stats(0.0).evictions == 0
