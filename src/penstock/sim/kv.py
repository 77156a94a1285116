"""KV of a simulated request on its way between instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class SimKV(NamedTuple):
    """KV that is a number only; what it weighs is the link's business.

    Attributes:
        tokens: how many have KV.
    """

    tokens: int
    bytes: int = 0

    @classmethod
    def join(cls, parts: Sequence[SimKV]) -> SimKV:
        """Parts that follow each other, as one."""
        return cls(sum(part.tokens for part in parts))
