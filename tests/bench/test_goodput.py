from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.goodput import (
    Attempt,
    End,
    Latency,
    Timeline,
    latency_of,
    misses,
    percentiles,
    summarize,
)
from penstock.core.types import SLO

times = st.lists(st.floats(0.001, 10), min_size=1, max_size=20)


def timeline(sent: float, spaces: list[float]) -> Timeline:
    arrivals, now = [], sent
    for space in spaces:
        now += space
        arrivals.append(now)
    return Timeline(sent, arrivals, len(arrivals))


def attempt(
    request: int, ended: float, *, end: End = End.COMPLETED, broken: tuple[str, ...] = (),
    slo_class: str = "default", number: int = 0, tokens: int = 10,
) -> Attempt:  # fmt: skip
    latency = Latency(0.1, 0.01, 0.02, 0.2)
    return Attempt(request, number, slo_class, 5, tokens, ended - 0.2, ended, end, latency, broken)


@given(st.floats(0, 1000), times)
def test_latencies_add_up(sent: float, spaces: list[float]) -> None:
    seen = latency_of(timeline(sent, spaces))
    assert seen.ttft == pytest.approx(spaces[0])
    assert seen.e2e == pytest.approx(sum(spaces))
    if len(spaces) == 1:
        assert seen.tpot is None
        assert seen.gap is None
    else:
        assert seen.gap == pytest.approx(max(spaces[1:]))
        assert seen.ttft + seen.tpot * (len(spaces) - 1) == pytest.approx(seen.e2e)
        assert seen.tpot <= seen.gap + 1e-9


@given(times, st.floats(0.01, 100), st.floats(1.1, 50))
def test_latencies_do_not_depend_on_the_clock(
    spaces: list[float], shift: float, scale: float
) -> None:
    base = latency_of(timeline(0.0, spaces))
    moved = latency_of(timeline(shift, spaces))
    stretched = latency_of(timeline(0.0, [s * scale for s in spaces]))
    for name in ("ttft", "tpot", "gap", "e2e"):
        value = getattr(base, name)
        if value is None:
            assert getattr(moved, name) is None
        else:
            assert getattr(moved, name) == pytest.approx(value, abs=1e-9)
            assert getattr(stretched, name) == pytest.approx(value * scale)


def test_a_piece_with_several_tokens_counts_them_all() -> None:
    seen = latency_of(Timeline(0.0, [1.0, 2.0], 5))
    assert seen == Latency(1.0, 0.25, 1.0, 2.0)


def test_nothing_came() -> None:
    nothing = latency_of(Timeline(0.0, [], 0))
    assert nothing == Latency(None, None, None, None)
    assert misses(nothing, SLO(ttft=9, gap=9)) == ("ttft",)


def test_times_that_run_backwards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token at 1\.0 after 2\.0"):
        Timeline(0.0, [2.0, 1.0], 2)


@given(times, st.floats(0.001, 10), st.floats(0, 5))
def test_a_looser_slo_is_never_missed_more(
    spaces: list[float], bound: float, looser: float
) -> None:
    latency = latency_of(timeline(0.0, spaces))

    def broken(limit: float) -> set[str]:
        return set(misses(latency, SLO(ttft=limit, tpot=limit, gap=limit, e2e=limit)))

    assert broken(bound + looser) <= broken(bound)
    assert misses(latency, SLO()) == ()


@pytest.mark.parametrize("name", ["ttft", "tpot", "gap", "e2e"])
def test_each_bound_is_judged_by_its_own_latency(name: str) -> None:
    latency = Latency(1.0, 2.0, 3.0, 4.0)
    value = getattr(latency, name)
    assert misses(latency, SLO(**{name: value})) == ()
    assert misses(latency, SLO(**{name: math.nextafter(value, 0)})) == (name,)


attempts = st.lists(
    st.builds(
        attempt,
        st.integers(0, 5),
        st.floats(0.1, 20),
        end=st.sampled_from(End),
        broken=st.sampled_from([(), ("ttft",), ("gap",), ("ttft", "gap")]),
        slo_class=st.sampled_from(["a", "b"]),
        number=st.integers(0, 2),
        tokens=st.integers(0, 50),
    )
)


@given(attempts, st.floats(0.5, 9))
def test_a_summary_counts_every_attempt_of_its_window_once(
    rows: list[Attempt], middle: float
) -> None:
    whole = summarize(rows, 0.0, 20.0)
    parts = [summarize(rows, 0.0, middle), summarize(rows, middle, 20.0)]
    assert sum(p.attempts for p in parts) == whole.attempts
    assert whole.attempts == sum(a.end is not End.CUT for a in rows)
    tokens = [p.goodput_output_tps * p.seconds for p in parts]
    assert sum(tokens) == pytest.approx(whole.goodput_output_tps * whole.seconds)
    assert sum(c.attempts for c in whole.classes.values()) == whole.attempts
    assert sum(c.goodput_output_tps for c in whole.classes.values()) == pytest.approx(
        whole.goodput_output_tps
    )
    assert whole.goodput_output_tps <= whole.throughput_output_tps + 1e-9
    assert whole.goodput_output_tps <= whole.goodput_total_tps
    assert sum(whole.ends.values()) == whole.attempts
    if whole.attempts:
        assert whole.attainment == pytest.approx(whole.goodput_rps * 20 / whole.attempts)


def test_goodput_counts_only_what_met_its_slo() -> None:
    rows = [
        attempt(0, 1.0, tokens=30),
        attempt(1, 2.0, tokens=70, broken=("gap",)),
        attempt(1, 3.0, tokens=70, number=1),
        attempt(2, 4.0, tokens=9, end=End.REFUSED),
        attempt(3, 5.0, tokens=9, end=End.CUT),
    ]
    seen = summarize(rows, 0.0, 10.0)
    assert seen.goodput_output_tps == pytest.approx(10.0)
    assert seen.goodput_total_tps == pytest.approx(11.0)
    assert seen.throughput_output_tps == pytest.approx(17.9)
    assert seen.attainment == pytest.approx(0.5)
    assert seen.requests_met == 2
    assert seen.retries == 1
    assert seen.ends == {"completed": 3, "refused": 1}
    assert seen.classes["default"].broken == {"gap": 1}


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        summarize([], 1.0, 1.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within_range(values: list[float]) -> None:
    table = percentiles(Latency(v, None, None, v) for v in values)
    row = table["ttft"]
    assert min(values) <= row["p50"] <= row["p90"] <= row["p99"] <= max(values)
    assert set(table) == {"ttft", "e2e"}


def test_only_completed_attempts_can_be_met() -> None:
    assert [attempt(0, 1.0, end=end).met for end in End] == [end is End.COMPLETED for end in End]
