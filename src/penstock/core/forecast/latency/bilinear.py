"""Step time of static batches: bilinear in batch size and padded length.

Problem: how long a slice of a batch will take must be known before batches are made.
Source: SCLS (arXiv 2406.13511): prefill and each decode step are bilinear in batch size and
length; the slice's time is their sum.
Rule: ``prefill(N, L) = p1 N L + p2 N + p3 L + p4``, ``decode(N, l) = d1 N l + d2 N + d3 l + d4``
with ``l`` the longest context; a slice of ``S`` tokens takes ``prefill(N, L)`` and ``S`` decode
steps at ``l = L + 1 .. L + S``.
Limits: everyone is padded to the longest, as the engines of that paper do; paged engines read what
each request has, and are overestimated.  Attention's square of the prompt is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import non_negative

Form: TypeAlias = tuple[float, float, float, float]
"""Prices, in seconds: per request and token, per request, per token, and a constant."""


@dataclass(frozen=True, slots=True)
class Bilinear:
    """Both forms.

    Raises:
        ValueError: a price is negative or not a number.
    """

    prefill: Form
    decode: Form

    wants_longest = True

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            prices = getattr(self, name)
            if len(prices) != 4 or not all(price >= 0 for price in prices):
                msg = f"latency.{name} is {prices}; it must be four prices of 0 or more seconds"
                raise ValueError(msg)

    @classmethod
    def fit(
        cls,
        prefills: Iterable[tuple[int, int, float]],
        decodes: Iterable[tuple[int, int, float]],
    ) -> Bilinear:
        """Least squares over measured (batch size, length, seconds), no price below 0.

        Raises:
            ValueError: fewer than four measurements of either.
        """
        return cls(_form("prefills", prefills), _form("decodes", decodes))

    def seconds(self, load: StepLoad) -> float:
        """Prompts count as one batch of their mean length, decoding as padded to the longest."""
        total = 0.0
        if load.prefill:
            requests = max(1, load.chunks)
            total += _value(self.prefill, requests, load.prefill / requests)
        if load.decoding:
            longest = load.longest or load.context / load.decoding
            total += _value(self.decode, load.decoding, longest)
        return total

    def slice_seconds(self, requests: int, length: int, tokens: int) -> float:
        """A slice: the batch's prefill and so many decode steps.

        Args:
            requests: N.
            length: L, the padded input length, tokens generated in earlier slices included.
            tokens: S, the slice's length.
        """
        d1, d2, d3, d4 = self.decode
        lengths = tokens * length + tokens * (tokens + 1) // 2
        steps = (d1 * requests + d3) * lengths + tokens * (d2 * requests + d4)
        return _value(self.prefill, requests, length) + steps

    def decode_line(self, decoding: int) -> None:
        """It follows the longest context, not their sum."""
        del decoding


def _value(form: Form, requests: float, length: float) -> float:
    both, each, token, constant = form
    return both * requests * length + each * requests + token * length + constant


def _form(name: str, measured: Iterable[tuple[int, int, float]]) -> Form:
    rows = [(n * length / s, n / s, length / s, 1 / s) for n, length, s in measured]
    if len(rows) < 4:
        msg = f"{name} has {len(rows)} measurements; four or more are needed"
        raise ValueError(msg)
    a, b, c, d = non_negative(np.array(rows)).tolist()
    return a, b, c, d
