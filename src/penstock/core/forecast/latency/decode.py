"""What decode steps of any subset would take, learned from those that ran.

Problem: who packs decode steps must know what a step would take with fewer requests in it.
Source: recursive least squares with forgetting, as in :mod:`.online`; the features are the two
views in the literature: the sum of the contexts (memory traffic) and the longest one (Kairos,
arXiv 2605.02329: one long sequence holds up the others).
Rule: seconds are a constant, a price per request, per context token, and per token of the longest
context, none below 0, fitted on relative errors with older steps fading.
Limits: before the first fit it knows nothing; what no step varied cannot be told apart.
"""

from __future__ import annotations

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import non_negative_normal
from penstock.core.snapshot import Floats, Ints

_FEWEST = 32


class DecodeSteps:
    """Prices of decode steps.

    Args:
        memory: steps after which an observation weighs a third.
        every: steps from one fit to the next.

    Attributes:
        known: whether it has been fitted.
    """

    def __init__(self, memory: float = 2000, every: int = 50) -> None:
        self._keep = 1 - 1 / memory
        self._every = every
        self._matrix: Floats = np.zeros((4, 4))
        self._vector: Floats = np.zeros(4)
        self._prices: Floats = np.zeros(4)
        self._observed = 0

    @property
    def known(self) -> bool:
        """See the class."""
        return self._observed >= _FEWEST

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that only decoded."""
        if load.prefill or not load.decoding:
            return
        row = np.array([1.0, load.decoding, load.context, load.longest]) / seconds
        self._matrix = self._keep * self._matrix + np.outer(row, row)
        self._vector = self._keep * self._vector + row
        self._observed += 1
        if self._observed == _FEWEST or (self.known and self._observed % self._every == 0):
            self._prices = non_negative_normal(self._matrix, self._vector)

    def prefixes(self, contexts: Ints) -> Floats:
        """Seconds of the steps of the first 1, 2, ... of these."""
        step, request, token, longest = self._prices.tolist()
        count = np.arange(1, len(contexts) + 1)
        most = np.maximum.accumulate(contexts)
        found: Floats = step + request * count + token * contexts.cumsum() + longest * most
        return found

    def seconds(self, contexts: Ints) -> float:
        """Of the step of all these; at least one."""
        step, request, token, longest = self._prices.tolist()
        spread = token * int(contexts.sum()) + longest * int(contexts.max())
        return float(step + request * len(contexts) + spread)
