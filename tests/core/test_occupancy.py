"""The peak forecast against a simulation that walks step by step."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast.occupancy import Occupancy, peak
from penstock.core.snapshot import Ints
from tests.core.views import ints

Pair = tuple[int, int]
BLOCK_SIZES = [1, 2, 3, 4, 16]

pairs = st.tuples(st.integers(1, 60), st.integers(0, 40))


def walked(requests: Sequence[Pair], block_size: int = 1) -> int:
    """The peak by its definition: every request grows by one token per step, then goes."""
    last = max((steps for _, steps in requests), default=0)
    return max(
        sum(-(-(tokens + step) // block_size) for tokens, steps in requests if steps >= step)
        for step in range(last + 1)
    )


def split(requests: Sequence[Pair]) -> tuple[Ints, Ints]:
    return ints([tokens for tokens, _ in requests]), ints([steps for _, steps in requests])


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([(10, 3), (20, 1)], 32),
        ([(5, 4), (4, 3), (5, 3), (3, 2), (4, 2)], 31),
        ([(7, 0)], 7),
        ([(7, 5)], 12),
        ([(3, 0), (3, 0)], 6),
    ],
)
def test_worked_examples(requests: list[Pair], expected: int) -> None:
    """The first two are the paper digest's and the LightLLM router documentation's."""
    assert peak(*split(requests)) == expected == walked(requests)


@given(st.lists(pairs, min_size=1, max_size=12), st.sampled_from(BLOCK_SIZES))
def test_peak_is_what_a_walk_finds(requests: list[Pair], block_size: int) -> None:
    assert peak(*split(requests), block_size) == walked(requests, block_size)


@given(st.lists(pairs, min_size=1, max_size=12), st.randoms())
def test_the_order_of_requests_does_not_matter(requests: list[Pair], random: Random) -> None:
    shuffled = list(requests)
    random.shuffle(shuffled)
    assert peak(*split(shuffled), 4) == peak(*split(requests), 4)


def test_nobody_needs_nothing() -> None:
    nobody = np.zeros((3, 0), dtype=np.int64)
    for block_size in (1, 16):
        future = Occupancy(ints([]), nobody, block_size)
        assert future.peaks == [0, 0, 0]
        assert future.with_candidate(5, [0, 1, 20]) == [
            walked([(5, steps)], block_size) for steps in (0, 1, 20)
        ]


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[tuple[int, list[int]]]]:
    """Tokens, steps per scenario, and candidates with steps per scenario."""
    count = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.integers(1, 50), max_size=8))
    steps = [[draw(st.integers(0, 25)) for _ in tokens] for _ in range(count)]
    joining = [
        (draw(st.integers(1, 50)), [draw(st.integers(0, 25)) for _ in range(count)])
        for _ in range(draw(st.integers(1, 5)))
    ]
    return tokens, steps, joining


@given(scenarios(), st.sampled_from(BLOCK_SIZES), st.integers(0, 5))
def test_joining_one_by_one_is_the_same_as_starting_together(
    load: tuple[list[int], list[list[int]], list[tuple[int, list[int]]]],
    block_size: int,
    unasked: int,
) -> None:
    """Also if the first ones join without an exact answer."""
    tokens, steps, joining = load
    width = len(tokens)
    matrix = np.array(steps, dtype=np.int64).reshape(len(steps), width)
    matrix.flags.writeable = False
    future = Occupancy(ints(tokens), matrix, block_size)
    there = [list(zip(tokens, row, strict=True)) for row in steps]
    for turn, (more, further) in enumerate(joining):
        joined = [[*pairs_, (more, step)] for pairs_, step in zip(there, further, strict=True)]
        expected = [walked(pairs_, block_size) for pairs_ in joined]
        bound = future.at_most(more, further)
        assert bound >= max(expected)
        there = joined
        if turn < unasked:
            future.add(more, further, bound)
            continue
        before = future.peaks
        assert future.with_candidate(more, further) == expected
        assert future.peaks == before, "asking must not change anything"
        future.add(more, further, max(expected))
        assert future.peaks == expected


@given(scenarios(), st.sampled_from(BLOCK_SIZES))
def test_a_candidate_that_does_not_join_is_forgotten(
    load: tuple[list[int], list[list[int]], list[tuple[int, list[int]]]], block_size: int
) -> None:
    tokens, steps, joining = load
    matrix = np.array(steps, dtype=np.int64).reshape(len(steps), len(tokens))
    future = Occupancy(ints(tokens), matrix, block_size)
    answers = [future.with_candidate(more, further) for more, further in joining]
    again = [future.with_candidate(more, further) for more, further in joining]
    assert answers == again
