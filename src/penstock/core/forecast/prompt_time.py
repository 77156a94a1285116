"""How long prompts will take, learned from steps that computed some.

Problem: an order by deadlines needs the time that each waiting prompt would take.
Source: Kairos (arXiv 2605.02329), section on prefill: a running average of tokens per second; that
attention grows with the length is our own addition.
Rule: seconds are spread over tokens, or over tokens and over the work of attention (tokens times
the context that each attends to, on average), fitted by least squares with older steps fading.
Until a step has been seen, prompts take no time.
Limits: steps that decode as well count in full, so on mixed instances a prompt's time is with the
decoding beside it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import non_negative_normal
from penstock.core.snapshot import Floats, Ints


class PromptTime(Protocol):
    """Predicts how long prompts take."""

    def seconds(self, computed: Ints, tokens: Ints) -> Floats:
        """Of computing the tokens from ``computed`` up to ``tokens``, for each row."""
        ...

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step."""
        ...


class RunningRate:
    """All tokens so far over all seconds so far: the paper's running average."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0

    def seconds(self, computed: Ints, tokens: Ints) -> Floats:
        """Tokens over the rate."""
        each = self._seconds / self._tokens if self._tokens else 0.0
        spread: Floats = (tokens - computed).astype(np.float64) * each
        return spread

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step with prompts in it."""
        if load.prefill:
            self._tokens += load.prefill
            self._seconds += seconds


class LengthAware:
    """A price per token, and one per token and token that it attends to.

    Args:
        memory: steps after which an observation weighs a third.
    """

    def __init__(self, memory: float = 500) -> None:
        self._keep = 1 - 1 / memory
        self._matrix: Floats = np.zeros((2, 2))
        self._vector: Floats = np.zeros(2)
        self._prices: Floats = np.zeros(2)

    def seconds(self, computed: Ints, tokens: Ints) -> Floats:
        """By the present prices."""
        count = (tokens - computed).astype(np.float64)
        spread: Floats = count * (self._prices[0] + self._prices[1] * (computed + count / 2))
        return spread

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step with prompts in it; errors count by their share of the step."""
        if not load.prefill:
            return
        row = np.array([load.prefill, load.prefill_work]) / seconds
        self._matrix = self._keep * self._matrix + np.outer(row, row)
        self._vector = self._keep * self._vector + row
        self._prices = non_negative_normal(self._matrix, self._vector)
