"""Prices of slices from step times: the bilinear forms, fitted on a grid, and how far they are off.

Problem: the batcher needs the time of a slice in closed form, and step times are not bilinear.
Source: SCLS (arXiv 2406.13511): least squares over a grid of batch sizes and lengths, with the
errors on the grid and on other points reported apart.
Rule: prefill of ``N`` prompts padded to ``L``, and a decode step of ``N`` requests at ``l``
tokens each, over powers of two; tested between them.
Limits: at small sizes a GPU takes the same time for any work, which no bilinear form says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.slices import SliceCost

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_BETWEEN_SIZES = (3, 6, 12, 24, 48, 96)
_BETWEEN_LENGTHS = (24, 48, 96, 192, 384, 768, 1536)


class Priced(NamedTuple):
    """The forms, and their mean absolute relative errors.

    Attributes:
        train: of prefills and of decode steps, on the grid that they were fitted to.
        test: the same between the grid's points.
        slices: of whole slices of 128 tokens, between the grid's points.
    """

    model: Bilinear
    train: tuple[float, float]
    test: tuple[float, float]
    slices: float


def price(latency: LatencyModel) -> Priced:
    """Fit both forms to a model of step times, and test them."""
    grid = list(product(_SIZES, _LENGTHS))
    between = list(product(_BETWEEN_SIZES, _BETWEEN_LENGTHS))
    model = Bilinear.fit(
        [(n, length, prefill_seconds(latency, n, length)) for n, length in grid],
        [(n, length, decode_seconds(latency, n, length)) for n, length in grid],
    )

    def off(of: Callable[[LatencyModel, int, int], float], points: list[tuple[int, int]]) -> float:
        return _mean(abs(of(model, *point) / of(latency, *point) - 1) for point in points)

    kinds = (prefill_seconds, decode_seconds)
    train, test = (tuple(off(kind, points) for kind in kinds) for points in (grid, between))
    slices = _mean(
        abs(model.slice_seconds(n, length, 128) / slice_seconds(latency, n, length, 128) - 1)
        for n, length in between
    )
    return Priced(model, (train[0], train[1]), (test[0], test[1]), slices)


def cost_of(
    model: Bilinear, *, slice_tokens: int, safety: float, most: int, block_size: int = 1
) -> Callable[[int], SliceCost]:
    """What a dispatcher asks for: prices on instances with so many KV tokens."""

    def cost(kv_tokens: int) -> SliceCost:
        return SliceCost(model, slice_tokens, max(1, int(safety * kv_tokens)), most, block_size)

    return cost


def prefill_seconds(latency: LatencyModel, requests: int, length: int) -> float:
    """Of so many prompts, padded to this length."""
    tokens = requests * length
    return latency.seconds(StepLoad(0, 0, tokens, tokens * length / 2, requests))


def decode_seconds(latency: LatencyModel, requests: int, length: int) -> float:
    """Of a step of so many requests that each attend to so many tokens."""
    return latency.seconds(StepLoad(requests, requests * length, longest=length))


def slice_seconds(latency: LatencyModel, requests: int, length: int, tokens: int) -> float:
    """Of a padded batch: its prefill, and so many decode steps."""
    steps = (decode_seconds(latency, requests, length + step) for step in range(1, tokens + 1))
    return prefill_seconds(latency, requests, length) + sum(steps)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
