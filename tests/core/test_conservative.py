"""Conservative admission: prompt + cap of everyone <= over_commit * capacity."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.policies.admit.conservative import Conservative
from penstock.core.policies.base import Admit, Defer
from tests.core.drive import Job, capabilities, policy, run
from tests.core.views import Row, candidate, snapshot

pairs = st.tuples(st.integers(1, 40), st.integers(2, 40))


@given(
    st.lists(pairs, max_size=6),
    st.lists(pairs, min_size=1, max_size=6),
    st.sampled_from([1, 4]),
    st.sampled_from([0.5, 1.0, 1.5]),
)
def test_it_admits_while_all_reservations_fit(
    rows: list[tuple[int, int]],
    queue: list[tuple[int, int]],
    block_size: int,
    over_commit: float,
) -> None:
    view = snapshot(
        [Row(prompt, 1, cap) for prompt, cap in rows],
        capacity=200,
        block_size=block_size,
        shared=2,
        lingering=3,
    )
    judge = Conservative(over_commit).judge(view)
    reserved = 5 + sum(-(-(prompt + cap) // block_size) for prompt, cap in rows)
    for prompt, cap in queue:
        need = -(-(prompt + cap) // block_size)
        fits = reserved + need <= over_commit * 200
        assert isinstance(judge(candidate(prompt, cap, block_size=block_size)), Admit) == fits
        reserved += need if fits else 0


def test_what_is_generated_does_not_count_twice() -> None:
    judge = Conservative().judge(snapshot([Row(5, 4, 5)], capacity=20))
    assert isinstance(judge(candidate(5, 5)), Admit)
    assert judge(candidate(1, 1)) == Defer(
        "KV memory: 20 blocks reserved and 2 to reserve are more than 20"
    )


def test_common_blocks_are_reserved_once() -> None:
    rows = [Row(12, 1, 4, shared=8), Row(12, 1, 4, shared=8)]
    view = snapshot(rows, capacity=8, block_size=4, shared=2)
    judge = Conservative().judge(view)
    assert isinstance(judge(candidate(12, 4, shared=8, block_size=4)), Admit)
    assert isinstance(judge(candidate(1, 1, block_size=4)), Defer)


loads = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 25), st.integers(0, 20)),
    min_size=1,
    max_size=10,
)


@given(loads, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans(), st.integers(32, 60))
@settings(max_examples=50)
def test_it_never_evicts(
    load: list[tuple[int, int, int, int]], block_size: int, depth: int, share: bool, room: int
) -> None:
    machine = capabilities(
        kv_blocks=-(-room // block_size),
        block_size=block_size,
        depth=depth,
        prefix_cache=share,
        max_request_tokens=32,
    )
    jobs = [
        Job(tuple(range(prompt)), cap, length, arrival) for prompt, cap, length, arrival in load
    ]
    outcome = run(jobs, machine, policy("tgi"))
    assert outcome.scheduler.stats(0.0).evictions == 0


@pytest.mark.parametrize("over_commit", [0.0, -1.0])
def test_an_over_commit_out_of_range_is_named(over_commit: float) -> None:
    with pytest.raises(ValueError, match=f"over_commit is {over_commit}; it must be above 0"):
        Conservative(over_commit)
