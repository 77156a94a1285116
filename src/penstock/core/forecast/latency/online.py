"""Prices fitted while steps come in, from any engine that measures them.

Problem: a profile is of another machine, another version, another day.
Source: recursive least squares with exponential forgetting (Plackett 1950), on relative errors,
with a little ridge towards a prior (Hoerl and Kennard 1970).
Rule: keep the normal equations of the affine model's features over measured seconds, each step's
weight shrinking by ``1 - 1 / memory`` per step that follows; solve them, no price below 0, every so
many steps.  A price that is off the prior's by the larger of the two costs a thousandth of a step
that is off by its own time, so what has not been seen keeps the prior's price.  Until there are
enough steps, the prior answers.
Limits: a price that the prior has at nothing stays there until it is seen; what is not affine shows
in the error.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import features, non_negative_normal

Floats: TypeAlias = NDArray[np.float64]
_FEWEST = 20
_RIDGE = 1e-3


class OnlineAffine:
    """An affine model of the steps observed so far.

    Args:
        prior: what answers until 20 steps have been observed, and whose prices hold for what none
            of them had.
        memory: steps after which an observation weighs a third, at least 1.
        every: steps from one solution to the next.

    Attributes:
        model: the present prices.
        observed: steps so far.

    Raises:
        ValueError: ``memory`` or ``every`` is less than 1.
    """

    wants_longest = False

    def __init__(self, prior: Affine, memory: float = 2000, every: int = 50) -> None:
        for name, value in (("memory", memory), ("every", every)):
            if value < 1:
                msg = f"{name} is {value}; it must be at least 1 step"
                raise ValueError(msg)
        self.model = prior
        self.observed = 0
        self._keep = 1 - 1 / memory
        self._every = every
        self._matrix: Floats = np.zeros((5, 5))
        self._vector: Floats = np.zeros(5)
        self._prior: Floats = np.array(
            [prior.step, prior.token, prior.work, prior.request, prior.context]
        )
        self._off = self._weight = 0.0

    @property
    def error(self) -> float | None:
        """Mean absolute relative error of predictions made before each step was seen.

        None until a step has been predicted by a fit.
        """
        return self._off / self._weight if self._weight else None

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step.

        Raises:
            ValueError: it took no time.
        """
        if not seconds > 0:
            msg = f"seconds is {seconds}; a step must take more than 0"
            raise ValueError(msg)
        if self.observed >= _FEWEST:
            self._off = self._keep * self._off + abs(self.model.seconds(load) / seconds - 1)
            self._weight = self._keep * self._weight + 1
        row = np.array(features(load)) / seconds
        self._matrix = self._keep * self._matrix + np.outer(row, row)
        self._vector = self._keep * self._vector + row
        self.observed += 1
        if self.observed == _FEWEST or (
            self.observed > _FEWEST and self.observed % self._every == 0
        ):
            self.model = Affine(*self._solved().tolist())

    def _solved(self) -> Floats:
        size = np.maximum(self._prior, non_negative_normal(self._matrix, self._vector))
        ridge = np.divide(_RIDGE, size**2, out=np.zeros(5), where=size > 0)
        return non_negative_normal(
            self._matrix + np.diag(ridge), self._vector + ridge * self._prior
        )

    def seconds(self, load: StepLoad) -> float:
        """By the present prices."""
        return self.model.seconds(load)

    def decode_line(self, decoding: int) -> tuple[float, float]:
        """By the present prices, which hold until the next observation."""
        return self.model.decode_line(decoding)
