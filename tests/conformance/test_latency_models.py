"""The latency kit over every model, and over models that must fail it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.forecast.latency.affine import Affine, DecodeSteps
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.latency.lookup import LookUpTable
from penstock.core.forecast.latency.online import OnlineAffine
from penstock.core.forecast.latency.tiles import Tiles
from penstock.sim import profiles
from penstock.sim.layer_table import read_layer_table
from tests.conformance.latency_kit import check_latency_model
from tests.sim.test_validate import write_tables

AFFINE = Affine(0.01, 1e-5, 1e-9, 1e-4, 1e-7)


def online() -> OnlineAffine:
    model = OnlineAffine(AFFINE)
    truth = Affine(0.02, 2e-5, 2e-9, 2e-4, 2e-7)
    for i in range(200):
        load = StepLoad(1 + i % 40, (1 + i % 40) * (i % 90 + 1), 7 * i % 300, 40.0 * i, i % 3)
        model.observe(load, truth.seconds(load))
    return model


def look_up() -> LookUpTable:
    cells = {(n, k): 0.01 + 1e-4 * n + 1e-7 * n * k for n in (1, 8, 64) for k in (64, 512, 4096)}
    return LookUpTable(cells, 20_000)


MODELS: dict[str, Callable[[], LatencyModel]] = {
    "affine": lambda: AFFINE,
    "roofline": lambda: profiles.load("llama-2-7b/a100-80g"),
    "tiles": lambda: Tiles(16, 5e-4, 1e-3, 1e-5, 1e-7, 1e-4, 5e-7, 3e-4),
    "bilinear": lambda: Bilinear((1e-7, 1e-4, 1e-6, 0.01), (1e-7, 1e-4, 1e-6, 0.01)),
    "look-up": look_up,
    "online": online,
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    check_latency_model(MODELS[name]())


def test_layer_table(tmp_path: Path) -> None:
    check_latency_model(read_layer_table(write_tables(tmp_path), 32).with_host(0.001))


def test_decode_steps() -> None:
    check_latency_model(DecodeSteps(), prefill_counts=False)


class Shrinking:
    """Faster with more to do."""

    wants_longest = False

    def seconds(self, load: StepLoad) -> float:
        return 1 / (1 + load.decoding + load.prefill)

    def decode_line(self, decoding: int) -> None:
        del decoding


class ShrinkingPrompts(Shrinking):
    """Faster with longer prompts."""

    def seconds(self, load: StepLoad) -> float:
        return 1 + 1 / (1 + load.prefill)


class OffTheLine(Shrinking):
    """Its line is another model's."""

    def seconds(self, load: StepLoad) -> float:
        return 1.0 + load.context

    def decode_line(self, decoding: int) -> tuple[float, float]:  # type: ignore[override]
        return 1.0 * decoding, 2.0


@pytest.mark.parametrize("model", [Shrinking(), ShrinkingPrompts(), OffTheLine()])
def test_the_kit_can_fail(model: LatencyModel) -> None:
    with pytest.raises(AssertionError):
        check_latency_model(model)
