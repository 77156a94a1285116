"""Where the forecast peak of KV memory is least.

Problem: the number of requests says little of the memory they will need, and an instance that
overflows evicts.
Source: our own, from Past-Future's forecast (arXiv 2507.10150, sections 3.2 and 3.3).
Rule: for every instance, draw an output length for each of its requests, given what it has
generated, from the lengths that ended lately, and compute the peak occupancy; the least share of
the capacity wins, with the newcomer's tokens added.
Limits: draws are random; one joint scenario per choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.lengths import LengthHistory
from penstock.core.forecast.occupancy import peak
from penstock.core.policies.dispatch import InstanceView


@dataclass(slots=True)
class ForecastAware:
    """Where the least memory will be needed.

    Attributes:
        rng: of the draws.
        window: past output lengths kept.
    """

    rng: np.random.Generator
    window: int = 1000
    history: LengthHistory = field(init=False)

    needs_progress = True
    needs_cost = False

    def __post_init__(self) -> None:
        self.history = LengthHistory(self.window)

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """The instance with the least forecast peak."""
        shares = [(self._peak(view) + tokens) / view.kv_tokens for view in instances]
        return min(range(len(instances)), key=shares.__getitem__)

    def observe(self, length: int) -> None:
        """Learn the length of a request that came to its own end."""
        self.history.observe(length)

    def _peak(self, view: InstanceView) -> int:
        rows = view.rows()
        if not rows:
            return 0
        prompt, generated, cap = np.array(rows, dtype=np.int64).T
        lengths = self.history.draw_running(self.rng.random(len(rows)), generated, cap)
        return peak(prompt + generated, np.maximum(lengths - generated, 0))
