"""Prices from measured steps, and how wrong they are on steps that were held out.

Problem: step times have noise with a long tail, and differ by two orders of magnitude.
Source: our own.
Rule: least squares of relative errors, prices not below zero; then once more without the steps
that are off by more than four times the typical error, and relative to the model.
Limits: one line for all batch sizes; what is not affine shows in the error.  A roofline is fitted
to all steps alike, which suits tables more than live measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.roofline import Roofline

Floats: TypeAlias = NDArray[np.float64]

_FAR_OFF = 4.0
_ROUNDS = 100
_REWEIGHTED = 3


class Sample(NamedTuple):
    """A step, or the mean of some alike.

    Attributes:
        seconds: what it took, host time included.
    """

    load: StepLoad
    seconds: float


def fit_affine(samples: Sequence[Sample]) -> Affine:
    """The affine model of some steps.

    Raises:
        ValueError: there are none, or one took no time.
    """
    table = np.array([features(sample.load) for sample in samples])
    return Affine(*fitted_prices(table, samples).tolist())


def fitted_prices(table: Floats, samples: Sequence[Sample]) -> Floats:
    """Prices of the columns of a table, from the seconds of the steps that are its rows.

    Args:
        table: [steps, prices].

    Raises:
        ValueError: there are no steps, or one took no time.
    """
    seconds = _seconds(samples)
    rows = table / seconds[:, None]
    prices = non_negative(rows)
    off = np.abs(rows @ prices - 1)
    near = off <= max(_FAR_OFF * float(np.median(off)), 1e-9)
    table, seconds = table[near], seconds[near]
    prices = non_negative(rows[near])
    for _ in range(_REWEIGHTED):
        # Errors relative to what was measured count a step that was too fast more than one that
        # was too slow, and the sum of many comes out too small.
        guessed = np.maximum(table @ prices, 1e-12)
        rows = table / guessed[:, None]
        prices = non_negative_normal(rows.T @ rows, rows.T @ (seconds / guessed))
    return prices


def fit_roofline(samples: Sequence[Sample]) -> Roofline:
    """The roofline model of some steps, without host time, which is in its other terms.

    Which bound holds for which step is found by iteration.

    Raises:
        ValueError: there are none, or one took no time.
    """
    seconds = _seconds(samples)
    tokens = np.array([load.prefill + load.decoding for load, _ in samples], dtype=float)
    shared = np.array(
        [[load.decoding, load.context, load.prefill_work] for load, _ in samples], dtype=float
    )
    bound = tokens > np.median(tokens)
    for _ in range(_ROUNDS):
        rows = np.column_stack((~bound, bound, np.where(bound, tokens, 0), shared))
        weights, base, token, *rest = non_negative(rows / seconds[:, None]).tolist()
        before, bound = bound, base + token * tokens > weights
        if (before == bound).all():
            break
    return Roofline(0.0, weights, base, token, *rest)


def errors(model: LatencyModel, samples: Sequence[Sample]) -> Floats:
    """Signed relative errors of a model on some steps."""
    guesses = np.array([model.seconds(sample.load) for sample in samples])
    off: Floats = guesses / np.array([sample.seconds for sample in samples]) - 1
    return off


def mape(model: LatencyModel, samples: Sequence[Sample]) -> float:
    """Mean absolute relative error of a model on some steps.

    Raises:
        ValueError: there are no steps.
    """
    if not samples:
        msg = "there are no steps to test a model on"
        raise ValueError(msg)
    return float(np.abs(errors(model, samples)).mean())


def features(load: StepLoad) -> tuple[float, float, float, float, float]:
    """What :class:`Affine` has prices for, in the order of its fields."""
    return (1.0, load.prefill, load.prefill_work, load.decoding, load.context)


def _seconds(samples: Sequence[Sample]) -> Floats:
    if not samples:
        msg = "there are no steps to fit"
        raise ValueError(msg)
    seconds = np.array([sample.seconds for sample in samples])
    if not (seconds > 0).all():
        msg = f"a step took {seconds.min()} s; it must be above 0"
        raise ValueError(msg)
    return seconds


def non_negative(rows: Floats) -> Floats:
    """Prices, none below 0, whose sum comes nearest to 1 in each row, by least squares.

    With few prices there are few sets of those that are above 0, so all are tried.

    Args:
        rows: float64 [steps, prices], features over measured seconds.
    """
    return non_negative_normal(rows.T @ rows, rows.sum(axis=0))


def non_negative_normal(matrix: Floats, vector: Floats) -> Floats:
    """The same from the normal equations: ``rows.T @ rows`` and ``rows.T @ wanted``."""
    count = len(vector)
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    scaled = matrix / np.outer(scale, scale)
    target = vector / scale
    best, least = np.zeros(count), 0.0
    for size in range(1, count + 1):
        for chosen in map(list, combinations(range(count), size)):
            part = scaled[np.ix_(chosen, chosen)]
            found = np.linalg.lstsq(part, target[chosen], rcond=1e-12)[0]
            if (found < 0).any():
                continue
            # The sum of squares, less that of the ones.
            loss = float(found @ part @ found - 2 * found @ target[chosen])
            if loss < least - 1e-12 * max(1.0, abs(least)):
                best, least = np.zeros(count), loss
                best[chosen] = found
    prices: Floats = best / scale
    return prices
