"""The requests that have KV memory, as rows of arrays.

A step works on all its requests at once: with one row per request, growing tables, gathering
tokens and writing results down are a few array operations, however many requests there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.types import Capabilities, PrefixKey, RequestId
from penstock.engine.errors import PlanError
from penstock.engine.kv import BlockPool, Blocks

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Segments:
    """A step's work: ``counts[i]`` tokens of row ``rows[i]``, from ``starts[i]`` on."""

    rows: Ints
    starts: Ints
    counts: Ints

    def only(self, index: int) -> Segments:
        """One of them."""
        one = slice(index, index + 1)
        return Segments(self.rows[one], self.starts[one], self.counts[one])


class Rows:
    """Block tables and token histories of started requests.

    Args:
        capabilities: how many requests, tokens and blocks there may be.

    Attributes:
        pool: the KV blocks.
        tokens: int32 ``[rows, max tokens]``, prompt and then output of each request.
        total: int64 ``[rows]``, tokens that are known.
        computed: int64 ``[rows]``, tokens that have KV.
        table: int32 ``[rows, max blocks]``, the blocks of each request.
    """

    def __init__(self, capabilities: Capabilities) -> None:
        self._block_size = capabilities.block_size
        self.pool = BlockPool(capabilities.kv_blocks)
        rows = capabilities.max_batch
        # The last token of a request is known but never gets KV.
        longest = min(capabilities.max_request_tokens, capabilities.kv_tokens + 1)
        blocks = -(-longest // self._block_size)
        # Pages of these that no request ever reaches are never committed to memory.
        self.tokens: Tokens = np.empty((rows, longest), dtype=np.int32)
        self.table: Blocks = np.empty((rows, blocks), dtype=np.int32)
        self.total: Ints = np.zeros(rows, dtype=np.int64)
        self.computed: Ints = np.zeros(rows, dtype=np.int64)
        self._held: Ints = np.zeros(rows, dtype=np.int64)
        self._row: dict[RequestId, int] = {}
        self._free = list(range(rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._row

    def row(self, request_id: RequestId) -> int:
        """The request's row.

        Raises:
            PlanError: it has not started.
        """
        try:
            return self._row[request_id]
        except KeyError:
            msg = f"request {request_id} computes but has not started"
            raise PlanError(msg) from None

    def of(self, request_ids: Sequence[RequestId]) -> Ints:
        """The rows of these requests, in order.

        Raises:
            PlanError: one has not started.
        """
        return np.array([self.row(request_id) for request_id in request_ids], dtype=np.int64)

    def start(
        self, request_id: RequestId, tokens: Sequence[int] | Tokens, cached: Sequence[PrefixKey]
    ) -> None:
        """Give a request a row; its first blocks are the cached ones.

        Raises:
            PlanError: it has a row, all rows are taken, or a block is not cached.
        """
        if request_id in self._row or not self._free:
            why = "has started already" if request_id in self._row else "exceeds max_batch"
            msg = f"request {request_id} {why}"
            raise PlanError(msg)
        if len(tokens) > self.tokens.shape[1]:
            msg = f"request {request_id} has {len(tokens)} tokens; {self.tokens.shape[1]} fit"
            raise PlanError(msg)
        blocks = self.pool.share(cached)
        row = self._free.pop()
        self._row[request_id] = row
        self.tokens[row, : len(tokens)] = tokens
        self.table[row, : len(blocks)] = blocks
        self.total[row] = len(tokens)
        self.computed[row] = len(blocks) * self._block_size
        self._held[row] = len(blocks)

    def bring(self, row: int, tokens: int) -> tuple[int, Blocks]:
        """Blocks for tokens whose KV comes from elsewhere, and from which token on it is needed.

        Raises:
            KVOverflowError: there are not enough.
        """
        start = int(self.computed[row])
        count = max(0, tokens - start)
        one = np.array([row], dtype=np.int64)
        self.grow(Segments(one, np.array([start]), np.array([count])))
        self.computed[row] = start + count
        return start, self.blocks(row)

    def blocks(self, row: int) -> Blocks:
        """The blocks of a row."""
        return self.table[row, : self._held[row]]

    def drop(self, request_id: RequestId) -> Tokens:
        """Take a request's row and blocks away; returns all tokens it had."""
        row = self.row(request_id)
        del self._row[request_id]
        self._free.append(row)
        self.pool.release(self.blocks(row))
        return self.known(row)

    def known(self, row: int) -> Tokens:
        """A copy of the tokens of a row."""
        return self.tokens[row, : self.total[row]].copy()

    def publish(self, row: int, index: int, key: PrefixKey) -> None:
        """Share a block of a row.

        Raises:
            PlanError: it is not full, or the key is in use.
        """
        if (index + 1) * self._block_size > self.computed[row]:
            msg = f"block {index} is published, but only {self.computed[row]} tokens have KV"
            raise PlanError(msg)
        self.pool.publish(int(self.table[row, index]), key)

    def grow(self, segments: Segments) -> None:
        """Give each row the blocks that its segment needs.

        Raises:
            KVOverflowError: there are not enough.
            PlanError: a segment does not begin where the row's KV ends, or goes too far.
        """
        rows, ends = segments.rows, segments.starts + segments.counts
        if (segments.starts != self.computed[rows]).any() or (ends > self.total[rows]).any():
            msg = (
                f"tokens {segments.starts.tolist()} to {ends.tolist()} are to be computed, but "
                f"{self.computed[rows].tolist()} of {self.total[rows].tolist()} have KV"
            )
            raise PlanError(msg)
        held = self._held[rows]
        more = np.maximum(-(-ends // self._block_size) - held, 0)
        needed = int(more.sum())
        if needed:
            blocks = self.pool.take(needed)
            self.table[np.repeat(rows, more), ragged(held, more)] = blocks
            self._held[rows] = held + more

    def extend(self, rows: Ints) -> Blocks:
        """Give each of these different rows one more block; returns the blocks.

        Raises:
            KVOverflowError: there are not enough.
        """
        blocks = self.pool.take(len(rows))
        self.table[rows, self._held[rows]] = blocks
        self._held[rows] += 1
        return blocks

    def append(self, rows: Ints, tokens: Ints) -> None:
        """Write down one new token for each of these different rows."""
        self.tokens[rows, self.total[rows]] = tokens
        self.total[rows] += 1

    def check(self) -> None:
        """Raise AssertionError unless tables, references and counts agree."""
        self.pool.check(self._tables())
        assert len(self._free) + len(self._row) == len(self.total), "a row is lost"
        for request_id, row in self._row.items():
            room = self._held[row] * self._block_size
            assert self.computed[row] <= room, f"{request_id} has KV without a block"
            assert self.computed[row] <= self.total[row], f"{request_id} has KV of no token"

    def check_idle(self) -> None:
        """The part of :meth:`check` that costs nothing, where no request has a row."""
        if not self._row:
            self.pool.check_idle()

    def _tables(self) -> Iterator[Blocks]:
        return (self.blocks(row) for row in self._row.values())


def ragged(starts: Ints, counts: Ints) -> Ints:
    """``starts[0] ... starts[0] + counts[0] - 1``, then the same for 1, 2 and so on."""
    offsets = np.cumsum(counts) - counts
    span: Ints = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - offsets, counts)
    return span
