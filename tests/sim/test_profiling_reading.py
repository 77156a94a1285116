"""From token times to step times, on streams made by hand."""

from __future__ import annotations

from array import array

import pytest

from penstock.bench.client import Answer
from penstock.core.forecast.latency.base import StepLoad
from penstock.sim.profiling.probes import Probe, ProbeError, Seen, Stream
from penstock.sim.profiling.reading import decode_samples, join_samples


def stream(prompt: int, times: list[float]) -> Stream:
    return Stream(prompt, Answer(0.0, array("d", times)))


def test_a_window_is_the_mean_of_its_steps_without_hiccups() -> None:
    times = [0.5 + 0.1 * k for k in range(31)]
    times = [*times[:20], *(t + 3.0 for t in times[20:])]  # one hiccup
    seen = Seen(Probe(2, 10, (4,)), [stream(10, times), stream(50, times)], [(0.5, 7.0)])
    (sample,) = decode_samples(seen)
    assert sample.seconds == pytest.approx(0.1)
    assert sample.load == StepLoad(2, 60 + 2 * 15.5, longest=round(50 + 15.5))
    seen.windows = [(0.61, 0.69)]
    with pytest.raises(ProbeError, match="2 streams brought no tokens"):
        decode_samples(seen)


def test_a_prompt_in_one_step() -> None:
    times = [1.0, 1.1, 1.2, 1.7, 1.8]
    late = [t + 0.001 for t in times]
    seen = Seen(Probe(2, 10, (4,)), [stream(10, times), stream(10, late)])
    seen.joined = [stream(40, [1.7004])]
    (sample,) = join_samples(seen, 64)
    assert sample.seconds == pytest.approx(0.5)
    assert sample.load == StepLoad(2, 26, 40, 40 * 20, 1, 13)


def test_a_prompt_in_several_steps_has_a_sample_for_each() -> None:
    seen = Seen(Probe(1, 10, (4,)), [stream(10, [1.0, 1.1, 1.5, 1.9, 2.1, 2.2])])
    seen.joined = [stream(45, [2.1])]
    steps = join_samples(seen, 21)
    assert [sample.seconds for sample in steps] == pytest.approx([0.4, 0.4, 0.2])
    assert [sample.load.prefill for sample in steps] == [20, 20, 5]
    assert [sample.load.prefill_work for sample in steps] == [200, 600, 212.5]
    assert [sample.load.context for sample in steps] == [12, 13, 14]


def test_repeats_are_one_sample_and_unseen_beginnings_none() -> None:
    times = [1.0, 1.1, 1.6, 1.7, 2.3, 2.4, 3.1]
    seen = Seen(Probe(1, 10, (4,)), [stream(10, times)])
    seen.joined = [stream(4, [1.6]), stream(4, [2.3]), stream(4, [3.1])]
    (sample,) = join_samples(seen, 64)
    assert sample.seconds == pytest.approx(0.6)
    seen.joined = [stream(4, [1.0])]
    assert join_samples(seen, 64) == []
