"""Round-robin: the instances in turn.

Problem: somebody must get it.
Source: what the compared systems of SCLS (arXiv 2406.13511) do; most load balancers' default.
Rule: each batch goes to the instance after the last one's.
Limits: requests differ by orders of magnitude, so equal numbers are not equal loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.policies.dispatch import InstanceView


@dataclass(slots=True)
class RoundRobin:
    """In turn.

    Attributes:
        last: the instance that was chosen last.
    """

    last: int = -1

    needs_progress = False
    needs_cost = False

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """The next one after the last."""
        del tokens
        later = [i for i, instance in enumerate(instances) if instance.number > self.last]
        index = later[0] if later else 0
        self.last = instances[index].number
        return index

    def observe(self, length: int) -> None:
        """Nothing to learn."""
