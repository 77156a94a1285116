"""Each latency model recovers what it is made for, and says how far it is off."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.latency.fit import Sample, fit_affine, mape
from penstock.core.forecast.latency.lookup import LookUpTable
from penstock.core.forecast.latency.online import OnlineAffine
from penstock.core.forecast.latency.tiles import Tiles, fit_steps, fit_tiles

TRUTH = Affine(step=0.008, token=4e-5, work=3e-9, request=1e-4, context=2e-7)


def steps(count: int, seed: int, noise: float = 0.0, truth: Affine = TRUTH) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        decoding = int(rng.integers(0, 64))
        prefill = int(rng.integers(0 if decoding else 1, 512))
        load = StepLoad(
            decoding, decoding * int(rng.integers(10, 3000)), prefill,
            prefill * float(rng.integers(10, 4000)), int(prefill > 0),
        )  # fmt: skip
        found.append(Sample(load, truth.seconds(load) * float(rng.lognormal(0, noise))))
    return found


def test_prices_are_recovered_and_hold_on_other_steps() -> None:
    model = fit_affine(steps(300, 1, noise=0.05))
    assert mape(model, steps(200, 2)) < 0.02
    assert mape(model, steps(200, 3, noise=0.05)) == pytest.approx(0.04, abs=0.015)


def test_a_few_steps_that_were_interrupted_do_not_count() -> None:
    data = steps(300, 4)
    data[::30] = [Sample(load, 20 * seconds) for load, seconds in data[::30]]
    assert mape(fit_affine(data), steps(100, 5)) < 0.01


def test_tiles_are_found_where_there_are_some_and_only_there() -> None:
    truth = Tiles(16, 6e-4, 1e-3, 1e-5, 1e-7, 3e-5, 5e-7, 3e-4)
    rng = np.random.default_rng(8)
    tiled = [
        Sample(load, truth.seconds(load) * float(rng.lognormal(0, 0.01)))
        for load, _ in steps(2000, 9)
        if load.prefill < 100
    ]
    found = fit_steps(tiled)
    assert isinstance(found, Tiles)
    assert found.rows == 16
    assert mape(found, [Sample(load, truth.seconds(load)) for load, _ in steps(100, 10)]) < 0.015
    assert isinstance(fit_steps(steps(500, 11, noise=0.03)), Affine)


def test_bad_tiles_are_named() -> None:
    with pytest.raises(ValueError, match=r"latency\.tile is -1"):
        Tiles(16, -1, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"latency\.rows is 0\.5; it must be 1 token or more"):
        Tiles(0.5, 1, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="rows is empty"):
        fit_tiles(steps(10, 12), ())


@pytest.mark.parametrize("bad", [[], [Sample(StepLoad(1, 1), 0.0)]])
def test_nothing_can_be_fitted(bad: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"no steps|above 0"):
        fit_affine(bad)


def test_online_prices_follow_a_machine_that_changes() -> None:
    model = OnlineAffine(Affine(1.0, 0, 0, 0, 0), memory=200, every=20)
    load = StepLoad(8, 8000)
    for sample in steps(400, 6):
        model.observe(*sample)
    assert model.seconds(load) == pytest.approx(TRUTH.seconds(load), rel=0.01)
    assert 0 < (model.error or 0) < 0.05
    slow = Affine(0.016, 8e-5, 6e-9, 2e-4, 4e-7)
    for sample in steps(1500, 7, truth=slow):
        model.observe(*sample)
    assert model.seconds(load) == pytest.approx(slow.seconds(load), rel=0.02)


def test_online_prices_begin_with_the_prior() -> None:
    prior = Affine(1.0, 0, 0, 0, 0)
    model = OnlineAffine(prior)
    for sample in steps(19, 8):
        model.observe(*sample)
    assert model.seconds(StepLoad(1, 1)) == 1.0
    assert model.error is None
    with pytest.raises(ValueError, match="seconds is 0"):
        model.observe(StepLoad(1, 1), 0)
    with pytest.raises(ValueError, match="memory is 0"):
        OnlineAffine(prior, memory=0)


def test_what_was_never_seen_keeps_the_price_of_the_prior() -> None:
    prior = Affine(0.1, 1e-3, 1e-7, 1e-2, 1e-5)
    model = OnlineAffine(prior)
    for sample in steps(400, 9):
        load = sample.load._replace(prefill=0, prefill_work=0.0, chunks=0)
        if load.decoding:
            model.observe(load, TRUTH.seconds(load))
    assert model.model.token == pytest.approx(prior.token)
    assert model.model.work == pytest.approx(prior.work)
    load = StepLoad(20, 20_000)
    assert model.seconds(load) == pytest.approx(TRUTH.seconds(load), rel=0.001)


def test_a_prior_that_is_far_off_is_forgotten() -> None:
    model = OnlineAffine(Affine(1e-4, 1e-6, 1e-11, 1e-6, 1e-9))
    for sample in steps(600, 10):
        model.observe(*sample)
    assert mape(model, steps(200, 11)) < 0.02


def test_a_slice_is_its_prefill_and_its_steps() -> None:
    model = Bilinear((1e-7, 1e-4, 1e-6, 0.01), (2e-8, 1e-5, 3e-7, 0.02))
    steps_alone = sum(model.seconds(StepLoad(6, 0, longest=100 + k)) for k in range(1, 33))
    prefill = model.seconds(StepLoad(0, 0, prefill=600, chunks=6))
    assert model.slice_seconds(6, 100, 32) == pytest.approx(prefill + steps_alone)


def test_bilinear_forms_are_recovered() -> None:
    truth = Bilinear((1e-7, 1e-4, 1e-6, 0.01), (2e-8, 1e-5, 3e-7, 0.02))
    grid = [(n, length) for n in (1, 4, 16, 64) for length in (16, 128, 1024)]
    fitted = Bilinear.fit(
        [(n, k, truth.seconds(StepLoad(0, 0, n * k, chunks=n))) for n, k in grid],
        [(n, k, truth.seconds(StepLoad(n, n * k, longest=k))) for n, k in grid],
    )
    assert fitted.prefill == pytest.approx(truth.prefill, rel=1e-3)
    assert fitted.decode == pytest.approx(truth.decode, rel=1e-3)
    with pytest.raises(ValueError, match="prefills has 1 measurements"):
        Bilinear.fit([(1, 1, 1.0)], [])
    with pytest.raises(ValueError, match=r"latency\.decode"):
        Bilinear((0, 0, 0, 1), (0, 0, -1, 1))


def test_cells_are_means_of_all_that_was_seen() -> None:
    table = LookUpTable({(1, 100): 0.01, (1, 1000): 0.02, (8, 100): 0.03, (8, 1000): 0.04}, 1000, 2)
    assert table.step(1, 100) == 0.01
    assert table.step(1, 550) == pytest.approx(0.015)
    assert table.step(100, 9000) == 0.04, "beyond the table its rim answers"
    for seconds in (0.05, 0.05):
        table.observe(StepLoad(7, 7 * 900, longest=900), seconds)
    assert table.step(8, 1000) == pytest.approx((2 * 0.04 + 2 * 0.05) / 4)
    table.observe(StepLoad(0, 0, prefill=6000, chunks=1), 2.0)
    assert table.prefill_rate == pytest.approx((2 * 1000 + 6000) / 4)


@pytest.mark.parametrize(
    ("cells", "rate", "words"),
    [
        ({}, 1.0, "whole grid"),
        ({(1, 1): 1.0, (2, 2): 1.0}, 1.0, r"none for \[\(1, 2\)\]"),
        ({(1, 1): 0.0}, 1.0, r"\(1, 1\) is 0.0"),
        ({(1, 1): 1.0}, 0.0, "prefill_rate is 0.0"),
    ],
)
def test_no_table(cells: dict[tuple[int, int], float], rate: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LookUpTable(cells, rate)
