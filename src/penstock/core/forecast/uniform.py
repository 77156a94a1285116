"""Uniform numbers, a few at a time, without asking the generator each time.

A pass of Past-Future takes one number per request and scenario, and then one or a few for each
candidate.  A call of the generator costs more than the number.  The numbers are those that the
generator would have given, in its order.
"""

from __future__ import annotations

import numpy as np

from penstock.core.snapshot import Floats

_BATCH = 4_096


class Uniform:
    """Numbers in [0, 1).

    Args:
        rng: source, of which nobody else may draw.
    """

    __slots__ = ("_at", "_numbers", "_rng")

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._numbers: Floats = rng.random(0)
        self._at = 0

    def take(self, count: int) -> Floats:
        """The next ``count``."""
        begin, end = self._at, self._at + count
        if end > len(self._numbers):
            more = self._rng.random(max(count, _BATCH))
            self._numbers = np.concatenate((self._numbers[begin:], more))
            begin, end = 0, count
        self._at = end
        return self._numbers[begin:end]

    def few(self, count: int) -> list[float]:
        """The next ``count``, which are not many."""
        begin, end = self._at, self._at + count
        if end > len(self._numbers):
            few: list[float] = self.take(count).tolist()
        else:
            self._at = end
            few = self._numbers[begin:end].tolist()
        return few
