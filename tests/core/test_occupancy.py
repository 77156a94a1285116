"""The peak forecast against a simulation that walks step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast import occupancy
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


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_more_requests_than_sixteen_bits_count(block_size: int) -> None:
    """All hold one token more than full blocks, so that every count is as large as it can be."""
    count = 70_000
    tokens = np.full(count, 4 * block_size + 1, dtype=np.int64)
    steps = np.full(count, 2 * block_size - 1, dtype=np.int64)
    assert peak(tokens, steps, block_size) == count * 6


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("count", [127, 128, 254, 255, 256, 257, 511, 512])
def test_counts_that_fill_a_field(count: int, block_size: int) -> None:
    """Every request's rounding makes a block more at the peak, or every one's but one."""
    tokens = np.full(count, 2 * block_size - 1, dtype=np.int64)
    steps = np.full(count, block_size, dtype=np.int64)
    blocks = -(-(3 * block_size - 1) // block_size)
    assert peak(tokens, steps, block_size) == blocks * count
    tokens[-1] = block_size
    assert peak(tokens, steps, block_size) == blocks * (count - 1) + 2


@pytest.mark.parametrize("block_size", [1, 16])
def test_lengths_that_no_request_will_reach(block_size: int) -> None:
    """A cold start without caps that bind: steps beyond 31 bits."""
    far = (1 << 31) + 17
    assert peak(ints([5, 900]), ints([far, 3]), block_size) == -(-(5 + far) // block_size)


def test_nobody_needs_nothing() -> None:
    nobody = np.zeros((3, 0), dtype=np.int64)
    for block_size in (1, 16):
        future = Occupancy(ints([]), nobody, block_size)
        assert future.peaks == [0, 0, 0]
        future.join_below(5, [0, 1, 20], math.inf)
        assert future.peaks == [walked([(5, steps)], block_size) for steps in (0, 1, 20)]


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


@given(
    scenarios(),
    st.sampled_from(BLOCK_SIZES),
    st.integers(0, 2),
    st.integers(-3, 3),
    st.sampled_from([0, 1, 32]),
)
def test_who_joins_is_who_stays_below(
    load: tuple[list[int], list[list[int]], list[tuple[int, list[int]]]],
    block_size: int,
    free: int,
    slack: int,
    many: int,
) -> None:
    """By bounds or exactly: the answer is the walk's; some join whatever comes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(occupancy, "_MANY", many)
        _check_joining(load, block_size, free, slack)


def _check_joining(
    load: tuple[list[int], list[list[int]], list[tuple[int, list[int]]]],
    block_size: int,
    free: int,
    slack: int,
) -> None:
    tokens, steps, joining = load
    matrix = np.array(steps, dtype=np.int64).reshape(len(steps), len(tokens))
    matrix.flags.writeable = False
    future = Occupancy(ints(tokens), matrix, block_size)
    there = [list(zip(tokens, row, strict=True)) for row in steps]
    for turn, (more, further) in enumerate(joining):
        joined = [[*pairs_, (more, step)] for pairs_, step in zip(there, further, strict=True)]
        worst = max(walked(pairs_, block_size) for pairs_ in joined)
        limit = math.inf if turn < free else worst + slack
        said = future.join_below(more, further, limit)
        assert (said < limit) == (worst < limit)
        assert said >= worst if worst < limit else said <= worst
        if worst < limit:
            there = joined
        assert future.peaks == [walked(pairs_, block_size) for pairs_ in there]


def test_most_answers_need_no_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long queue that fits bit by bit: the bounds decide, but for a few close calls."""
    draw = Random(1)
    row = ints([draw.randrange(400) for _ in range(200)])
    future = Occupancy(ints([draw.randrange(1, 500) for _ in row]), row[np.newaxis], 16)
    sorts: list[int] = []

    def counted(rows: Ints, size: int) -> object:
        sorts.append(rows.shape[1])
        return sort(rows, size)

    sort = occupancy._sort
    limit = future.peaks[0] + 1000
    monkeypatch.setattr(occupancy, "_sort", counted)
    joined = 0
    while future.join_below(draw.randrange(1, 500), [draw.randrange(400)], limit) < limit:
        joined += 1
    assert joined > 30
    assert len(sorts) < 5
