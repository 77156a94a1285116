"""Uniform numbers taken a few at a time are the generator's own, in its order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast.uniform import Uniform


@given(st.lists(st.sampled_from([0, 1, 2, 5, 700, 4_096, 9_000]), min_size=1, max_size=12))
def test_they_are_what_the_generator_would_have_given(counts: list[int]) -> None:
    uniform = Uniform(np.random.default_rng(3))
    taken = np.concatenate([uniform.take(count) for count in counts])
    assert taken.tolist() == np.random.default_rng(3).random(sum(counts)).tolist()
