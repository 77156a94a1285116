"""The time and the memory of a batch for one slice of its output.

Problem: nobody knows how long an answer will be, so neither the time nor the memory of a batch.
Source: SCLS (arXiv 2406.13511): at most ``S`` tokens per request appear in a slice, which bounds
both.
Rule: a slice of ``N`` requests, the longest of ``L`` tokens, takes the padded prefill and ``S``
decode steps (:meth:`~penstock.core.forecast.latency.bilinear.Bilinear.slice_seconds`), and holds at
most ``N (L + S)`` tokens, which must stay within a share of the memory.
For one length the time is a line in the batch size, which is what makes batches quick to find.
Limits: a slice that ends early takes less; engines without padding need less of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.forecast.latency.bilinear import Bilinear


@dataclass(frozen=True, slots=True)
class SliceCost:
    """Prices of slices on one kind of instance.

    Attributes:
        model: fitted step times.
        tokens: S, the slice's length.
        room: KV tokens that a batch may hold: the capacity times the safety share.
        most: most requests of a batch.
        block_size: KV tokens in a block; a request holds whole ones.

    Raises:
        ValueError: a number is out of range.
    """

    model: Bilinear
    tokens: int
    room: int
    most: int
    block_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "room", "most", "block_size"):
            value = getattr(self, name)
            if value < 1:
                msg = f"slice.{name} is {value}; it must be at least 1"
                raise ValueError(msg)

    def line(self, length: int) -> tuple[float, float]:
        """Seconds of a slice of so long requests: (constant, per request)."""
        tokens = self.tokens
        p1, p2, p3, p4 = self.model.prefill
        d1, d2, d3, d4 = self.model.decode
        lengths = tokens * length + tokens * (tokens + 1) // 2
        constant = p3 * length + p4 + d3 * lengths + tokens * d4
        return constant, p1 * length + p2 + d1 * lengths + tokens * d2

    def seconds(self, requests: int, length: int) -> float:
        """A slice of so many requests, the longest of this length."""
        return self.model.slice_seconds(requests, length, self.tokens)

    def fits(self, length: int) -> int:
        """Most requests of a batch whose longest has this length; one fits in any case."""
        blocks = -(-(length + self.tokens) // self.block_size)
        return max(1, min(self.most, self.room // (blocks * self.block_size)))
