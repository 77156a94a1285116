"""Searches that simulations are calibrated with."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sim.search import crossing, lowest


@given(st.floats(-3, 6), st.floats(-2, 4), st.floats(0.01, 2), st.integers(1, 5))
def test_the_crossing_of_a_function_with_steps_is_found(
    root: float, near: float, reach: float, power: int
) -> None:
    calls = []

    def value(x: float) -> float:
        calls.append(x)
        smooth = math.copysign(abs(x - root) ** power, x - root)
        return smooth + math.copysign(0.01, x - root)

    found = crossing(value, (-2, 4), (near, reach), (1e-6, 1e-9))
    assert found == pytest.approx(min(max(root, -2), 4), abs=2e-6)
    assert len(calls) < 60
    assert all(-2 <= call <= 4 for call in calls)


def test_a_line_costs_few_values() -> None:
    calls = []

    def value(x: float) -> float:
        calls.append(x)
        return 3 * (x - 0.0123)

    assert crossing(value, (-0.01, 0.5), (0.003, 0.002), (1e-6, 1e-5)) == pytest.approx(0.0123)
    assert len(calls) <= 5


@given(st.floats(-0.5, 1.5))
def test_the_bottom_of_a_valley_is_found(bottom: float) -> None:
    found = lowest(lambda x: abs(x - bottom), 1.0, 0.005)
    assert found == pytest.approx(min(max(bottom, 0), 1), abs=0.005)
