"""Aggressive admission: used + needed <= watermark * capacity, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.policies.admit.aggressive import Aggressive
from penstock.core.policies.base import Admit, Defer
from tests.core.views import Row, candidate, snapshot


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=6),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([1, 4]),
    st.sampled_from([0.5, 0.9, 1.0]),
)
def test_it_admits_while_the_memory_used_now_fits(
    rows: list[tuple[int, int]], prompts: list[int], block_size: int, watermark: float
) -> None:
    view = snapshot(
        [Row(prompt, generated, 100) for prompt, generated in rows],
        capacity=120,
        block_size=block_size,
    )
    judge = Aggressive(watermark).judge(view)
    used = view.used
    for prompt in prompts:
        need = -(-prompt // block_size)
        fits = used + need <= watermark * 120
        assert isinstance(judge(candidate(prompt, 999, block_size=block_size)), Admit) == fits
        used += need if fits else 0


def test_reaching_the_watermark_is_allowed() -> None:
    judge = Aggressive(0.5).judge(snapshot(capacity=20))
    assert isinstance(judge(candidate(10, 1)), Admit)
    assert judge(candidate(1, 1)) == Defer(
        "KV memory: 10 blocks used and 1 needed are more than the watermark's 10"
    )


def test_blocks_that_others_hold_are_not_needed_again() -> None:
    view = snapshot(capacity=10, block_size=4)
    judge = Aggressive(1.0).judge(view)
    assert isinstance(judge(candidate(44, 1, shared=4, block_size=4)), Admit)
    assert isinstance(judge(candidate(1, 1, block_size=4)), Defer)


@pytest.mark.parametrize("watermark", [0.0, -1.0, 1.01])
def test_a_watermark_out_of_range_is_named(watermark: float) -> None:
    with pytest.raises(ValueError, match=rf"watermark is {watermark}; it must be in \(0, 1\]"):
        Aggressive(watermark)
