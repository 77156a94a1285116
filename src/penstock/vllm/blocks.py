"""Which of vLLM's KV blocks each request has.

Penstock's scheduler counts blocks, this module places them, and vLLM's workers are told where.
vLLM keeps block 0 for itself, so its block *n + 1* is our block *n*.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.core.memory import blocks_for
from penstock.core.types import Drop, PrefixKey, StepPlan
from penstock.engine.kv import BlockPool


class BlockTables:
    """The block tables of all requests that hold KV memory.

    Args:
        blocks: how many there are, without vLLM's own.
        block_size: tokens in each.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(blocks)
        self._tables: dict[str, list[int]] = {}

    def apply(self, plan: StepPlan) -> None:
        """Do what a plan says of memory, but for what its chunks and decoding need."""
        for drop in plan.drops:
            self._drop(drop)
        for key in plan.forget:
            self._pool.forget(key)
        for start in plan.starts:
            self._tables[start.id] = self._pool.share(start.cached).tolist()

    def grow(self, request_id: str, tokens: int) -> list[int]:
        """Make room for so many tokens in all; returns vLLM's numbers of the blocks that are new.

        Raises:
            KVOverflowError: more blocks are needed than are free (a scheduler bug).
        """
        table = self._tables[request_id]
        missing = blocks_for(tokens, self.block_size) - len(table)
        if missing <= 0:
            return []
        new = self._pool.take(missing).tolist()
        table += new
        return [block + 1 for block in new]

    def numbers(self, request_id: str) -> list[int]:
        """VLLM's numbers of all of a request's blocks, in order."""
        return [block + 1 for block in self._tables[request_id]]

    def publish(self, request_id: str, blocks: Sequence[tuple[int, PrefixKey]]) -> None:
        """Let others begin with these blocks: pairs of (index in the request, key)."""
        table = self._tables[request_id]
        for index, key in blocks:
            self._pool.publish(table[index], key)

    def check(self) -> None:
        """Raise AssertionError if blocks are lost or counted twice."""
        self._pool.check(np.array(table, dtype=np.int32) for table in self._tables.values())

    def _drop(self, drop: Drop) -> None:
        self.publish(drop.id, drop.publish)
        self._pool.release(np.array(self._tables.pop(drop.id), dtype=np.int32))
