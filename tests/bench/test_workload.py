from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bench import fitted
from penstock.bench.prompts import Prompts
from penstock.bench.workload import (
    LONGEST,
    Lengths,
    SLOClass,
    Workload,
    gamma,
    parse_slo,
    poisson,
    shuffled,
    synthetic,
)
from penstock.core.types import SLO

LENGTHS = ["7", "fixed:7", "uniform:3-9", "lognormal:20,0.5", "lognormal:20,2,30"]


def columns(workload: Workload) -> list[list[float]]:
    return [workload.prompt.tolist(), workload.output.tolist()]


@pytest.mark.parametrize("text", LENGTHS)
def test_lengths_are_whole_and_within_bounds(text: str) -> None:
    drawn = Lengths.parse(text).draw(2000, np.random.default_rng(0))
    assert drawn.dtype == np.int64
    assert drawn.min() >= 1
    if text.startswith("uniform"):
        assert set(drawn.tolist()) == set(range(3, 10))
    if text.endswith(",30"):
        assert drawn.max() == 30
    if text == "lognormal:20,0.5":
        assert np.median(drawn) == pytest.approx(20, abs=1)
        assert np.log(drawn).std() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("text", ["", "0", "-3", "uniform:9-3", "uniform:0-4", "gauss:1,2", "1.5"])
def test_other_notations_are_refused_by_value(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text!r} is not understood"):
        Lengths.parse(text)


@pytest.mark.parametrize(
    "text",
    ["2147483648", f"uniform:1-{'9' * 20}", f"lognormal:9,1,{'9' * 400}", "lognormal:3000000000,1"],
)
def test_lengths_beyond_the_bound_are_refused_by_value(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text!r} is out of range; .* at most 2147483647"):
        Lengths.parse(text)


def test_the_longest_length_can_be_drawn() -> None:
    for text in (
        "2147483647",
        "uniform:2147483647-2147483647",
        "lognormal:2147483647,9,2147483647",
    ):
        assert Lengths.parse(text).draw(50, np.random.default_rng(0)).max() == LONGEST


@pytest.mark.parametrize("sigma", [50, 5000])
def test_a_lognormal_beyond_the_bound_needs_a_largest_length(sigma: int) -> None:
    with pytest.raises(ValueError, match=f"lognormal:200,{sigma} draws more than 2147483647"):
        Lengths.parse(f"lognormal:200,{sigma}").draw(50, np.random.default_rng(0))
    cut = Lengths.parse(f"lognormal:200,{sigma},4096").draw(50, np.random.default_rng(0))
    assert (cut.min(), cut.max()) == (1, 4096)


@given(st.integers(0, 2**32), st.sampled_from(LENGTHS), st.integers(1, 50))
@settings(max_examples=30)
def test_the_same_seed_gives_the_same_requests(seed: int, text: str, count: int) -> None:
    lengths = Lengths.parse(text)
    first, again = (synthetic(lengths, lengths, count, seed) for _ in range(2))
    assert columns(first) == columns(again)
    assert poisson(count, 3.0, seed).tolist() == poisson(count, 3.0, seed).tolist()


def test_another_seed_gives_other_requests() -> None:
    lengths = Lengths.parse("uniform:1-1000")
    assert columns(synthetic(lengths, lengths, 50, 0)) != columns(
        synthetic(lengths, lengths, 50, 1)
    )


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_variation_asked_for(cv: float) -> None:
    times = gamma(40_000, 5.0, cv, seed=1)
    spaces = np.diff(times)
    assert times[0] == 0
    assert (spaces >= 0).all()
    assert spaces.mean() == pytest.approx(0.2, rel=0.05)
    assert spaces.std() / spaces.mean() == pytest.approx(cv, rel=0.05)


def test_arrivals_need_a_positive_rate() -> None:
    with pytest.raises(ValueError, match=r"rate is 0\.0"):
        poisson(3, 0.0, 0)


@given(st.floats(0.001, 1))
def test_scaling_keeps_every_length_at_least_one(factor: float) -> None:
    base = synthetic(Lengths.parse("uniform:1-900"), Lengths.parse("5"), 30, 0)
    scaled = base.scaled(factor)
    assert scaled.prompt.min() >= 1
    assert np.abs(scaled.prompt - base.prompt * factor).max() <= 1
    assert (factor == 1) == (not scaled.notes)


def test_a_draw_uses_every_row_before_it_repeats_one() -> None:
    base = Workload("t", np.arange(1, 11), np.arange(1, 11), arrival=np.arange(10.0))
    drawn = shuffled(base, 25, seed=3)
    assert sorted(drawn.prompt[:10].tolist()) == list(range(1, 11))
    assert sorted(drawn.prompt[10:20].tolist()) == list(range(1, 11))
    assert drawn.prompt[:10].tolist() != list(range(1, 11))
    assert drawn.arrival is None
    assert (drawn.prompt == drawn.output).all()


def test_classes_are_dealt_by_weight() -> None:
    classes = parse_slo(["chat*3:ttft=1,gap=0.2", "batch*1:e2e=60"])
    assert classes == (
        SLOClass("chat", SLO(ttft=1, gap=0.2), 3),
        SLOClass("batch", SLO(e2e=60), 1),
    )
    dealt = synthetic(Lengths.parse("1"), None, 4000, 0).with_classes(classes, 0)
    chat = sum(dealt.slo_class(i).name == "chat" for i in range(len(dealt)))
    assert chat == pytest.approx(3000, abs=120)


def test_no_slo_is_one_class_without_bounds() -> None:
    assert parse_slo([]) == (SLOClass("default", SLO(), 1.0),)
    assert parse_slo(["ttft=2"]) == (SLOClass("default", SLO(ttft=2), 1.0),)


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=x", "speed=3", "ttft=1,ttft=2", "a*0:ttft=1", "a b:ttft=1", "a:"]
)
def test_a_bad_slo_is_refused_by_value(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        parse_slo([text])


def test_a_bound_must_be_positive_and_a_class_named_once() -> None:
    with pytest.raises(ValueError, match=r"slo\.ttft is 0\.0"):
        parse_slo(["ttft=0"])
    with pytest.raises(ValueError, match="'a' is given 2 times"):
        parse_slo(["a:ttft=1", "a:ttft=2"])


def test_prompts_share_nothing_by_accident() -> None:
    made = Prompts(synthetic(Lengths.parse("64"), None, 50, 0), seed=1)
    first = [tuple(made.ids(i)[:4]) for i in range(50)] + [tuple(made.ids(0, turn=1)[:4])]
    assert len(set(first)) == 51
    assert made.ids(7) == made.ids(7)
    assert all(len(made.ids(i)) == 64 and min(made.ids(i)) >= 300 for i in range(50))
    assert max(max(made.ids(i)) for i in range(50)) < 1300


@given(st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=2, max_size=6))
def test_prompts_share_exactly_the_blocks_of_their_trace(blocks: list[list[int]]) -> None:
    lengths = np.array([4 * len(b) + 2 for b in blocks])
    workload = Workload("t", lengths, lengths, hash_ids=tuple(map(tuple, blocks)), hash_block=4)
    prompts = [Prompts(workload).ids(i) for i in range(len(blocks))]
    assert [len(p) for p in prompts] == lengths.tolist()
    for left, a in zip(prompts, blocks, strict=True):
        for right, b in zip(prompts, blocks, strict=True):
            common = next(
                (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)),
            )
            assert left[: 4 * common] == right[: 4 * common]
            if common < min(len(a), len(b)):
                end = 4 * (common + 1)
                assert left[:end] != right[:end]


def test_token_range_must_hold_ids() -> None:
    with pytest.raises(ValueError, match="token range is 5:5"):
        Prompts(synthetic(Lengths.parse("1"), None, 1, 0), low=5, high=5)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("sharegpt-o1", (380.6, 209), (2160.1, 1954)),
        ("azure-conversation", (1155, 1020), (211, 129)),
    ],
)
def test_fitted_lengths_have_the_source_s_mean_and_median(
    name: str, prompt: tuple[float, float], output: tuple[float, float]
) -> None:
    made = fitted.fitted(name, 20_000, seed=0)
    for values, (mean, median) in ((made.prompt, prompt), (made.output, output)):
        assert values.mean() == pytest.approx(mean, rel=0.05)
        assert np.median(values) == pytest.approx(median, rel=0.05)
    assert made.prompt.min() >= 1
    assert made.output.min() >= 1
    assert columns(made) == columns(fitted.fitted(name, 20_000, seed=0))


def test_an_unknown_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="lengths is 'x'; it must be one of: sharegpt-o1"):
        fitted.fitted("x", 1, 0)
