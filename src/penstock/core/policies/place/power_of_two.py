"""The better of two random instances.

Problem: many routers that all send to the same least loaded instance overload it.
Source: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
Rule: draw two instances; of these, the one with fewer requests sent and not ended.
Limits: with one router, which knows all it sent, the least outstanding of all is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.core.policies.dispatch import InstanceView


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """Two at random.

    Attributes:
        rng: draws them.
    """

    rng: np.random.Generator

    needs_progress = False
    needs_cost = False

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """The one with fewer requests of two."""
        del tokens
        if len(instances) == 1:
            return 0
        drawn = self.rng.choice(len(instances), size=2, replace=False).tolist()
        return int(min(drawn, key=lambda index: instances[index].requests))

    def observe(self, length: int) -> None:
        """Nothing to learn."""
