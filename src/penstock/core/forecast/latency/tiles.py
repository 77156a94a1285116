"""Step time of an engine whose matrix kernels work on tiles of rows.

Problem: a kernel for sixteen rows takes as long for two; to a straight line through all batch
sizes small batches look too dear and large ones too cheap.
Source: our own, after measured steps of the native engine on a CPU with AMX; tile and wave
quantization of GPU kernels has the same form.
Rule: ``step + tile * ceil(tokens / rows) + token * prefill + work * prefill_work
+ chunk * chunks + request * decoding + context * context``, where ``tokens`` are all that the step
computes.
Limits: one size of tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import Sample, features, fit_affine, fitted_prices, mape

ROWS = (8, 16, 32, 64, 128, 256)
"""Tiles that a fit tries."""

_CLEARLY = 0.9


@dataclass(frozen=True, slots=True)
class Tiles:
    """Seconds each, but for ``rows``.

    Attributes:
        rows: tokens in a tile.
        tile: per tile, full or not.
        step: per step, host overhead included.
        token: per prompt token.
        work: per token squared of prompt attention.
        request: per decoding request.
        context: per KV token that decoding requests attend to.
        chunk: per prompt chunk, however short.
    """

    rows: float
    tile: float
    step: float
    token: float
    work: float
    request: float
    context: float
    chunk: float

    wants_longest = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                msg = f"latency.{field.name} is {value}; it must be 0 or more"
                raise ValueError(msg)
        if self.rows < 1:
            msg = f"latency.rows is {self.rows}; it must be 1 token or more"
            raise ValueError(msg)

    def seconds(self, load: StepLoad) -> float:
        """The sum."""
        return (
            self.step
            + self.tile * math.ceil((load.decoding + load.prefill) / self.rows)
            + self.token * load.prefill
            + self.work * load.prefill_work
            + self.request * load.decoding
            + self.context * load.context
            + self.chunk * load.chunks
        )

    def decode_line(self, decoding: int) -> tuple[float, float]:
        """Without prefill, the context is all that changes."""
        tiles = math.ceil(decoding / self.rows)
        return self.step + self.tile * tiles + self.request * decoding, self.context


def fit_tiles(samples: Sequence[Sample], rows: Iterable[int] = ROWS) -> Tiles:
    """The model of some steps, with the size of tile that explains them best.

    Raises:
        ValueError: there are no steps, one took no time, or there is no size to try.
    """
    best: tuple[float, Tiles] | None = None
    for size in rows:
        table = np.array([
            (*features(load), load.chunks, math.ceil((load.decoding + load.prefill) / size))
            for load, _ in samples
        ])  # fmt: skip
        step, token, work, request, context, chunk, tile = fitted_prices(table, samples).tolist()
        model = Tiles(size, tile, step, token, work, request, context, chunk)
        off = float(np.median([abs(model.seconds(load) / took - 1) for load, took in samples]))
        if best is None or off < best[0]:
            best = off, model
    if best is None:
        msg = "rows is empty; give sizes of tiles to try"
        raise ValueError(msg)
    return best[1]


def fit_steps(samples: Sequence[Sample]) -> Affine | Tiles:
    """The affine model of some steps, or that with tiles where it is clearly better.

    Raises:
        ValueError: there are no steps, or one took no time.
    """
    affine, tiles = fit_affine(samples), fit_tiles(samples)
    better = mape(tiles, samples) < _CLEARLY * mape(affine, samples)
    return tiles if better and tiles.tile > 0 else affine
