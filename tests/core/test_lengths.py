"""The past: the drawing rule of Past-Future against its pseudo-code, written out literally."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast.lengths import LengthHistory
from tests.core.views import ints

unit = st.floats(0, 1, exclude_max=True)
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=20)


def history(past: list[int]) -> LengthHistory:
    """A history that holds exactly these lengths (a single one twice: no window is smaller)."""
    past = past * 2 if len(past) == 1 else past
    made = LengthHistory(len(past))
    for length in past:
        made.observe(length)
    return made


def knots(past: list[int], generated: int, cap: int) -> list[int]:
    made = [generated, *(length for length in sorted(past) if length > generated)]
    if made[-1] < cap:
        made.append(cap)
    return made


def literal(past: list[int], generated: int, cap: int, uniform: float) -> int:
    """The pseudo-code's draw for a running request, line by line."""
    points = knots(past, generated, cap)
    if len(points) == 1:
        return generated
    x = uniform * (len(points) - 1)
    j = floor(x)
    drawn = round(points[j] + (points[j + 1] - points[j]) * (x - j))
    return min(cap, max(generated, drawn))


def one(made: LengthHistory, generated: int, cap: int, uniform: float) -> int:
    drawn = made.draw_running(np.array([[uniform]]), ints([generated]), ints([cap]))
    assert drawn.shape == (1, 1)
    return int(drawn[0, 0])


@given(lengths, st.integers(0, 70), st.integers(1, 90), unit)
def test_running_draws_follow_the_pseudo_code(
    past: list[int], generated: int, more: int, uniform: float
) -> None:
    cap = generated + more
    made = history(past)
    full = made.sorted_lengths().tolist()
    assert one(made, generated, cap, uniform) == literal(full, generated, cap, uniform)


@given(lengths, st.lists(st.tuples(st.integers(0, 70), st.integers(1, 90)), min_size=1), st.data())
def test_many_draws_at_once_are_the_same_as_one_by_one(
    past: list[int], running: list[tuple[int, int]], data: st.DataObject
) -> None:
    made = history(past)
    generated = ints([g for g, _ in running])
    cap = ints([g + more for g, more in running])
    uniform = np.array([[data.draw(unit) for _ in running] for _ in range(3)])
    drawn = made.draw_running(uniform, generated, cap)
    assert drawn.dtype == np.int64
    expected = [
        [one(made, int(g), int(m), u) for g, m, u in zip(generated, cap, row, strict=True)]
        for row in uniform.tolist()
    ]
    assert drawn.tolist() == expected


@given(lengths, st.integers(0, 70), st.integers(1, 90), unit)
def test_running_draws_stay_in_range(
    past: list[int], generated: int, more: int, uniform: float
) -> None:
    """In [g, max(m, last)] before the cap cuts, so in [g, m] after it."""
    assert generated <= one(history(past), generated, generated + more, uniform) <= generated + more


@given(
    st.integers(2, 6),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 90)), min_size=1, max_size=20),
    st.none() | st.integers(1, 60),
    unit,
)
def test_draws_keep_up_with_the_past(
    window: int, turns: list[tuple[int, int]], cold_start: int | None, uniform: float
) -> None:
    """Ends and draws take turns: each draw is from the window as it is by then."""
    made = LengthHistory(window, cold_start)
    for length, generated in turns:
        made.observe(length)
        full = made.sorted_lengths().tolist()
        cap = generated + 30
        assert one(made, generated, cap, uniform) == literal(full, generated, cap, uniform)


def test_knots_are_strictly_greater() -> None:
    """With g = 5 the past's 5 is no knot: the knots are 5 (g), 9, and the cap 20."""
    made = history([5, 5, 5, 9])
    assert one(made, 5, 20, 0.5) == 9
    assert one(made, 5, 20, 0.25) == 7
    assert one(made, 5, 20, 0.75) == round(14.5)


def test_the_cap_is_a_knot_only_beyond_the_past() -> None:
    made = history([4, 8])
    assert one(made, 0, 8, 0.5) == 4, "knots 0, 4, 8"
    assert one(made, 0, 16, 1 / 3) == 4, "knots 0, 4, 8, 16"
    assert one(made, 0, 6, 0.99) == 6, "a draw near 8 is cut to the cap"


def test_one_that_outlived_the_past_draws_up_to_its_cap() -> None:
    made = history([3, 4])
    assert one(made, 10, 20, 0.0) == 10
    assert one(made, 10, 20, 0.5) == 15


@given(lengths, st.integers(1, 90), st.lists(unit, min_size=1, max_size=5))
def test_new_draws_are_past_lengths(past: list[int], cap: int, uniform: list[float]) -> None:
    made = history(past)
    full = made.sorted_lengths().tolist()
    drawn = made.draw_new(uniform, cap)
    assert drawn == [min(cap, full[floor(u * len(full))]) for u in uniform]


def test_new_draws_are_uniform_over_the_past() -> None:
    made = history([1, 2, 2, 10])
    uniform = [0.0, 0.25, 0.5, 0.75, 0.999]
    assert made.draw_new(uniform, 100) == [1, 2, 2, 10, 10]


def test_a_cold_start_fills_half_of_the_window() -> None:
    assert LengthHistory(40, 6000).sorted_lengths().tolist() == [6000] * 20
    assert LengthHistory(5, 7).sorted_lengths().tolist() == [7, 7]


def test_a_cold_start_of_none_means_each_cap() -> None:
    made = LengthHistory(10)
    assert made.draw_new([0.0, 0.5, 0.99], 123) == [123] * 3
    drawn = made.draw_running(np.array([[0.01, 0.5]]), ints([3, 7]), ints([50, 60]))
    assert drawn.tolist() == [[50, 60]]


def test_the_oldest_leave_the_window() -> None:
    made = LengthHistory(4, 9)
    for length in (1, 2, 3):
        made.observe(length)
    assert made.sorted_lengths().tolist() == [1, 2, 3, 9]
    made.observe(4)
    made.observe(5)
    assert made.sorted_lengths().tolist() == [2, 3, 4, 5]


@given(st.integers(2, 12), st.lists(st.integers(1, 99), max_size=40))
def test_the_window_is_the_latest_lengths(window: int, observed: list[int]) -> None:
    made = LengthHistory(window, 50)
    for length in observed:
        made.observe(length)
    expected = ([50] * (window // 2) + observed)[-window:]
    assert made.sorted_lengths().tolist() == sorted(expected)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_that_is_too_small_is_named(window: int) -> None:
    with pytest.raises(ValueError, match=f"window is {window}; it must be at least 2"):
        LengthHistory(window)


def test_a_cold_start_of_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="cold_start is 0; it must be at least 1 token"):
        LengthHistory(4, 0)
