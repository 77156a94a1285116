"""The batcher: the recurrence's optimum, in less time than the recurrence takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.slices import SliceCost
from penstock.core.policies.batch.packed import Packed, best_cuts

prices = st.floats(0, 1, allow_subnormal=False) | st.sampled_from([0.0, 1e-6, 1e-3])
forms = st.tuples(prices, prices, prices, prices)
costs = st.builds(
    SliceCost,
    st.builds(Bilinear, forms, forms),
    tokens=st.integers(1, 50),
    room=st.integers(1, 2000),
    most=st.integers(1, 20),
)
pools = st.lists(st.integers(1, 200), max_size=40)


def recurrence(lengths: Sequence[int], cost: SliceCost, size: int) -> list[float]:
    """The rule as it stands: best[i] over all cuts for which the memory suffices."""
    best = [0.0]
    for index, length in enumerate(lengths):
        most = min(size or len(lengths), cost.fits(length))
        starts = range(max(0, index + 1 - most), index + 1)
        best.append(min(best[j] + cost.seconds(index + 1 - j, length) for j in starts))
    return best


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends], ends, strict=False))


def total(lengths: Sequence[int], ends: Sequence[int], cost: SliceCost) -> float:
    return sum(cost.seconds(end - start, lengths[end - 1]) for start, end in spans(ends))


@given(pools.map(sorted), costs, st.integers(0, 6))
def test_batches_take_the_least_time_that_the_recurrence_finds(
    lengths: list[int], cost: SliceCost, size: int
) -> None:
    ends = best_cuts(lengths, cost, size)
    assert ends == sorted(set(ends))
    assert not lengths or ends[-1] == len(lengths)
    least = recurrence(lengths, cost, size)[-1]
    assert total(lengths, ends, cost) == pytest.approx(least, rel=1e-9, abs=1e-12)
    for start, end in spans(ends):
        assert end - start <= min(size or end, cost.fits(lengths[end - 1]))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), costs)
def test_the_recurrence_finds_the_best_of_all_partitions(
    lengths: list[int], cost: SliceCost
) -> None:
    lengths.sort()
    n, least = len(lengths), float("inf")
    for bits in range(1 << (n - 1)):
        ends = [i + 1 for i in range(n - 1) if bits >> i & 1] + [n]
        if all(end - start <= cost.fits(lengths[end - 1]) for start, end in spans(ends)):
            least = min(least, total(lengths, ends, cost))
    assert recurrence(lengths, cost, 0)[-1] == pytest.approx(least, rel=1e-9, abs=1e-12)


@given(pools, costs)
def test_every_request_is_in_one_batch(lengths: list[int], cost: SliceCost) -> None:
    batches = Packed().batches(lengths, cost)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))


@given(costs, st.integers(1, 20), st.integers(1, 500))
def test_the_line_of_a_length_is_the_slices_time(
    cost: SliceCost, requests: int, length: int
) -> None:
    constant, each = cost.line(length)
    assert constant + requests * each == pytest.approx(cost.seconds(requests, length), rel=1e-9)


def test_a_batch_holds_whole_blocks() -> None:
    form = (1.0, 1.0, 1.0, 1.0)
    by_token = SliceCost(Bilinear(form, form), tokens=16, room=16_000, most=1_000)
    by_block = replace(by_token, block_size=16)
    assert (by_token.fits(17), by_block.fits(17)) == (16_000 // 33, 16_000 // 48)


def test_ten_thousand_requests_take_less_than_a_tenth_of_a_second() -> None:
    lengths = [16 + (7919 * index) % 2000 for index in range(10_000)]
    form = (2e-6, 1e-3, 1e-6, 1e-2)
    cost = SliceCost(Bilinear(form, form), tokens=128, room=64_000, most=256)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        batches = Packed().batches(lengths, cost)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1
    assert max(map(len, batches)) > 10
