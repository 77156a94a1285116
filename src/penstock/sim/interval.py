"""Confidence intervals of a mean over a few independent seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

LEVEL = 0.95
"""Confidence of all intervals here."""

SAME_LOAD = (
    "the trace's own times and lengths are the same under every seed: the interval holds "
    "the spread of the policy's draws alone, not that of the load"
)
"""What to say with an interval over seeds of a trace at its own times."""

# Student's t at 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean, and the interval that holds the true one with confidence ``LEVEL``.

    ``low`` and ``high`` are None for a single value, which says nothing about spread.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half its width; None for a single value."""
        return None if self.high is None else self.high - self.mean


def student_t(freedom: int) -> float:
    """Student's t at 97.5 % for so many degrees of freedom."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    # Cornish and Fisher's expansion; good to 4 digits from 30 degrees on.
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + (z**3 + z) / (4 * freedom) + second


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of independent values, at least one.

    It takes them as normally distributed about the mean; for few and skewed values it is a guide.
    """
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def ratio(values: Sequence[float], base: Sequence[float]) -> Interval:
    """The mean ratio of paired positive values: geometric, with the interval of its logarithm."""
    logs = interval([math.log(v / b) for v, b in zip(values, base, strict=True)])
    low, high = (None if bound is None else math.exp(bound) for bound in logs[1:])
    return Interval(math.exp(logs.mean), low, high)
