"""Physical KV blocks: which are free, which are shared, and under what prefix key.

The scheduler counts blocks, this module places them.  A block has one reference per
block table that holds it and one more while the prefix cache knows it; it is free at zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from penstock.core.types import PrefixKey
from penstock.engine.errors import KVOverflowError, PlanError

Blocks = npt.NDArray[np.int32]


class BlockPool:
    """The blocks of one engine, by number.

    Args:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._references = np.zeros(blocks, dtype=np.int32)
        # A stack: the block freed last is the one whose memory is still in a cache.
        self._stack: Blocks = np.arange(blocks - 1, -1, -1, dtype=np.int32)
        self._free = blocks
        self._cached: dict[PrefixKey, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nothing refers to."""
        return self._free

    @property
    def cached(self) -> int:
        """Blocks that the prefix cache knows."""
        return len(self._cached)

    def take(self, count: int) -> Blocks:
        """Hand out ``count`` free blocks, each with one reference.

        Raises:
            KVOverflowError: fewer are free.
        """
        if count > self._free:
            msg = f"{count} KV blocks are needed but {self._free} of {self.blocks} are free"
            raise KVOverflowError(msg)
        taken = self._stack[self._free - count : self._free].copy()
        self._free -= count
        self._references[taken] = 1
        return taken

    def share(self, keys: Iterable[PrefixKey]) -> Blocks:
        """Refer once more to the blocks cached under these keys.

        Raises:
            PlanError: a key is not cached; nothing has changed then.
        """
        try:
            blocks = np.array([self._cached[key] for key in keys], dtype=np.int32)
        except KeyError as error:
            msg = f"no KV block is cached under {error.args[0].hex()}"
            raise PlanError(msg) from None
        self._references[blocks] += 1
        return blocks

    def publish(self, block: int, key: PrefixKey) -> None:
        """Let the prefix cache know a block.

        Raises:
            PlanError: the key is in use.
        """
        if key in self._cached:
            msg = f"a KV block is cached under {key.hex()} already"
            raise PlanError(msg)
        self._cached[key] = block
        self._references[block] += 1

    def forget(self, key: PrefixKey) -> None:
        """Take a block out of the prefix cache.

        Raises:
            PlanError: the key is not cached.
        """
        block = self._cached.pop(key, None)
        if block is None:
            msg = f"no KV block is cached under {key.hex()}"
            raise PlanError(msg)
        self.release(np.array([block], dtype=np.int32))

    def release(self, blocks: Blocks) -> None:
        """Give one reference back for each of these different blocks."""
        self._references[blocks] -= 1
        freed = blocks[self._references[blocks] == 0]
        self._stack[self._free : self._free + len(freed)] = freed
        self._free += len(freed)

    def check(self, tables: Iterable[Blocks]) -> None:
        """Raise AssertionError unless the references are those of these tables and the cache."""
        expected = np.zeros_like(self._references)
        for table in tables:
            assert len(np.unique(table)) == len(table), "a table holds a block twice"
            expected[table] += 1
        for block in self._cached.values():
            expected[block] += 1
        wrong = np.flatnonzero(expected != self._references)
        assert not len(wrong), f"KV blocks {wrong[:8].tolist()} have wrong reference counts"
        free = np.sort(self._stack[: self._free])
        assert np.array_equal(free, np.flatnonzero(expected == 0)), "the free list is wrong"

    def check_idle(self) -> None:
        """Raise AssertionError if blocks are lost; cheap, for when no request has a table."""
        held = self.blocks - self._free
        assert held == len(self._cached), (
            f"{held} KV blocks are in use, but no request runs and {len(self._cached)} are cached"
        )
