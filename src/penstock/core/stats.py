"""Numbers about the present, for metrics, the gate and the live page."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.gate import Load


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler's state in numbers.

    Attributes:
        waiting, waiting_tokens: waiting requests, and tokens they must compute.
        running, decoding: requests with KV memory, and those of them that decode.
        kv_blocks, block_size: capacity in blocks, and tokens per block.
        kv_used, kv_idle: blocks held by requests, and cached blocks that nobody holds.
        plans: plans made so far.
        evictions, admissions: since the start.
        admission_rate: admissions per second out of the queue; None while unknown.
    """

    waiting: int
    waiting_tokens: int
    running: int
    decoding: int
    kv_blocks: int
    block_size: int
    kv_used: int
    kv_idle: int
    plans: int
    evictions: int
    admissions: int
    admission_rate: float | None

    @property
    def kv_usage(self) -> float:
        """Share of the KV memory that requests hold, 0 to 1."""
        return self.kv_used / self.kv_blocks

    @property
    def load(self) -> Load:
        """What the gate needs."""
        return Load(self.waiting, self.waiting_tokens, self.admission_rate)
