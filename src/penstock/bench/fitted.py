"""Real request lengths as small quantile tables, fitted by us; the sources are in the data file.

The two marginal distributions are tables of quantiles, joined by a Gaussian
copula whose correlation is that of the normal scores of the original lengths.
"""

from __future__ import annotations

from importlib.resources import files
from statistics import NormalDist

import msgspec
import numpy as np

from penstock.bench.workload import Workload


class Fit(msgspec.Struct, frozen=True):
    """One source: quantiles of prompt and output lengths at the table's probabilities."""

    source: str
    licence: str
    correlation: float
    prompt: list[int]
    output: list[int]


class _Table(msgspec.Struct, frozen=True):
    probabilities: list[float]
    fits: dict[str, Fit]


def names() -> tuple[str, ...]:
    """The fits there are."""
    return tuple(_table().fits)


def fitted(name: str, count: int, seed: int) -> Workload:
    """``count`` requests with lengths like the named source's.

    Raises:
        ValueError: there is no such fit.
    """
    table = _table()
    fit = table.fits.get(name)
    if fit is None:
        msg = f"lengths is {name!r}; it must be one of: {', '.join(table.fits)}"
        raise ValueError(msg)
    rng = np.random.default_rng([seed, *name.encode()])
    first, second = rng.standard_normal((2, count))
    second = fit.correlation * first + np.sqrt(1 - fit.correlation**2) * second
    below = np.vectorize(NormalDist().cdf, otypes=[np.float64])
    prompt, output = (
        np.rint(np.interp(below(scores), table.probabilities, quantiles)).astype(np.int64)
        for scores, quantiles in ((first, fit.prompt), (second, fit.output))
    )
    return Workload(f"{name}, fitted: {fit.source}", prompt, output)


def _table() -> _Table:
    data = files("penstock.bench").joinpath("fitted.json").read_bytes()
    return msgspec.json.decode(data, type=_Table)
