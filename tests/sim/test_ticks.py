"""Segments of step times say what a list of all token times would say."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.policies import presets
from penstock.core.types import SLO, Capabilities, OnMiss
from penstock.sim.run import Job, Run, run
from penstock.sim.sources import OpenLoop
from penstock.sim.ticks import TickTimes

stretches = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0, 3), st.floats(0.01, 2), st.floats(0, 0.5)),
    min_size=1,
    max_size=12,
)


@given(rows=stretches)
def test_times_and_largest_gaps_are_those_of_single_steps(
    rows: list[tuple[int, float, float, float]],
) -> None:
    ticks, now = TickTimes(), 0.0
    plain, begins = [0.0], []
    for count, idle, first, increase in rows:
        start = now + idle
        begins.append(len(plain))
        now = start
        for step in range(count):
            now += first + step * increase
            plain.append(now)
        ticks.append(count, start, first, increase)
    assert ticks.last == pytest.approx(now)
    assert ticks.times(1, ticks.count) == pytest.approx(plain[1:])
    gaps = [b - a for a, b in pairwise(plain)]
    for begin in begins:
        assert ticks.time(begin) == pytest.approx(plain[begin])
        assert ticks.largest_gap(begin) == pytest.approx(max(gaps[begin:], default=0.0))


class Opaque:
    """An affine model that does not say so: every step is planned by itself."""

    wants_longest = False

    def __init__(self, model: Affine) -> None:
        self._model = model

    def seconds(self, load: StepLoad) -> float:
        return self._model.seconds(load)

    def decode_line(self, decoding: int) -> None:  # noqa: ARG002
        return None


loads = st.lists(
    st.tuples(
        st.floats(0, 0.4),
        st.integers(1, 40),
        st.integers(1, 60),
        st.sampled_from([5, 30, 80]),
        st.sampled_from([None, 0.02, 0.1]),
        st.sampled_from(list(OnMiss)),
    ),
    min_size=1,
    max_size=14,
)


def facts(done: Run) -> list[tuple[object, ...]]:
    return [(r.job.id, r.ended) for r in done.records]


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("period", [1, 7])
@pytest.mark.parametrize("name", sorted(presets.PRESETS))
@given(rows=loads)
@settings(max_examples=25, deadline=None)
def test_jumping_over_stretches_changes_nothing(
    name: str, period: int, block_size: int, rows: list[tuple[object, ...]]
) -> None:
    machine = Capabilities(
        kv_blocks=240 // block_size,
        block_size=block_size,
        max_batch=6,
        max_step_tokens=24,
        max_request_tokens=200,
    )
    jobs = [
        Job(str(i), at, prompt, output, cap, SLO(ttft=bound, gap=bound, e2e=bound), on_miss=miss)
        for i, (at, prompt, output, cap, bound, miss) in enumerate(sorted(rows, key=lambda r: r[0]))
    ]
    model = Affine(step=1e-3, token=1e-5, work=1e-7, request=1e-5, context=3e-6)
    jumped, stepped = (
        run(OpenLoop(jobs), machine, presets.build(name, seed=3, period=period), latency)
        for latency in (model, Opaque(model))
    )
    assert facts(jumped) == facts(stepped)
    assert jumped.steps == stepped.steps
    assert jumped.decode_steps == stepped.decode_steps
    assert jumped.memory == pytest.approx(stepped.memory)
    assert jumped.evictions == stepped.evictions
    for a, b in zip(jumped.records, stepped.records, strict=True):
        assert a.at == pytest.approx(b.at)
        times = jumped.token_times(a)
        assert times == pytest.approx(stepped.token_times(b))
        assert len(times) == a.ended.output_tokens
        assert a.latency == pytest.approx(b.latency)
        if len(times) > 1:
            gap = max(y - x for x, y in pairwise(times))
            assert a.latency.gap == pytest.approx(gap)
