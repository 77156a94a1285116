"""From a plan's chunks and decoding requests to the arrays of one forward pass.

A step in which the same requests decode as in the step before, and nothing else happens, is
the common case: its arrays are those of the step before, advanced by one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.types import Chunk, RequestId
from penstock.engine.errors import PlanError
from penstock.engine.kv import Blocks
from penstock.engine.rows import Ints, Rows, Segments, ragged

Mask = npt.NDArray[np.bool_]

# Columns of block tables made ahead of need, so that growing them is rare.
_SPARE_BLOCKS = 8


@dataclass(slots=True)
class Inputs:
    """The arrays of a forward pass over ``T`` packed tokens of ``n`` segments.

    Attributes:
        tokens: int64 ``[T]``.
        positions: int64 ``[T]``, each token's place in its request.
        slots: int64 ``[T]``, ``block * block_size + offset`` of each token.
        keep: int64, packed tokens whose logits are wanted.
        query_start: int32 ``[n + 1]``, where each segment begins.
        context: int32 ``[n]``, tokens of each request with KV, this step's included.
        table: int32 ``[n, blocks]``, the blocks of each request.
    """

    tokens: Ints
    positions: Ints
    slots: Ints
    keep: Ints
    query_start: Blocks
    context: Blocks
    table: Blocks


@dataclass(frozen=True, slots=True)
class Step:
    """What a plan asks to compute.

    Attributes:
        ids: whose work it is: chunks and then decoding requests.
        segments: the same as arrays.
        sampling: which of them yield a token.
        sampled: whose tokens; in decode steps the plan's own tuple, which the sampler knows again.
        where: their rows.
        chunks: those of the plan that are computed.
        inputs: of the forward pass.
    """

    ids: tuple[RequestId, ...]
    segments: Segments
    sampling: Mask
    sampled: tuple[RequestId, ...]
    where: Ints
    chunks: tuple[Chunk, ...]
    inputs: Inputs


class Steps:
    """Makes steps, and advances them where it can.

    Args:
        rows: the started requests.
        block_size: tokens per KV block.
    """

    def __init__(self, rows: Rows, block_size: int) -> None:
        self._rows = rows
        self._size = block_size
        self._last: Step | None = None
        self._drawn: Ints | None = None

    def make(
        self, chunks: tuple[Chunk, ...], decode: tuple[RequestId, ...], *, undisturbed: bool
    ) -> Step:
        """The step of these chunks and decoding requests; their tables have grown for it.

        Args:
            chunks: at least one, or ``decode`` is not empty.
            decode: may be the very tuple of the step before.
            undisturbed: nobody has lost a row since then.

        Raises:
            PlanError: a request cannot do what it is asked.
            KVOverflowError: there are not enough blocks.
        """
        last, drawn = self._last, self._drawn
        self._drawn = None
        if undisturbed and not chunks and drawn is not None and last and last.ids is decode:
            self._advance(last, drawn)
            return last
        self._last = self._decode_step(decode) if not chunks else self._mixed(chunks, decode)
        return self._last

    def sampled(self, tokens: Ints) -> None:
        """Take note of the tokens of the last step, if it went well, one for each that sampled."""
        self._drawn = tokens

    def pack(self, segments: Segments, sampling: Mask) -> Inputs:
        """The arrays of a forward pass; the tables of the rows have grown for it."""
        rows, size = self._rows, self._size
        ends = np.cumsum(segments.counts)
        token_rows = np.repeat(segments.rows, segments.counts)
        positions = ragged(segments.starts, segments.counts)
        query_start = np.zeros(len(ends) + 1, dtype=np.int32)
        query_start[1:] = ends
        context = segments.starts + segments.counts
        blocks = rows.table[token_rows, positions // size].astype(np.int64)
        width = -(-int(context.max()) // size) + _SPARE_BLOCKS
        return Inputs(
            tokens=rows.tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            slots=blocks * size + positions % size,
            keep=ends[sampling] - 1,
            query_start=query_start,
            context=context.astype(np.int32),
            table=rows.table[segments.rows, :width],
        )

    def _decode_step(self, decode: tuple[RequestId, ...]) -> Step:
        rows = self._rows.of(decode)
        segments = Segments(rows, self._rows.computed[rows], np.ones_like(rows))
        sampling = np.ones(len(decode), dtype=np.bool_)
        self._claim(segments, sampling)
        inputs = self.pack(segments, sampling)
        # One array under both names, so that they advance together.
        segments = Segments(rows, inputs.positions, segments.counts)
        return Step(decode, segments, sampling, decode, rows, (), inputs)

    def _mixed(self, chunks: tuple[Chunk, ...], decode: tuple[RequestId, ...]) -> Step:
        names = tuple(chunk.id for chunk in chunks)
        rows = self._rows.of(names + decode)
        decoding = rows[len(names) :]
        segments = Segments(
            rows,
            _joined([chunk.start for chunk in chunks], self._rows.computed[decoding]),
            _joined([chunk.tokens for chunk in chunks], np.ones_like(decoding)),
        )
        sampling = np.ones(len(rows), dtype=np.bool_)
        sampling[: len(names)] = [chunk.samples for chunk in chunks]
        self._claim(segments, sampling)
        first = tuple(chunk.id for chunk in chunks if chunk.samples)
        # The plan's own tuple, if it can be: the sampler may know it from the last step.
        sampled = first + decode if first else decode
        return Step(
            names + decode,
            segments,
            sampling,
            sampled,
            rows[sampling],
            chunks,
            self.pack(segments, sampling),
        )

    def _claim(self, segments: Segments, sampling: Mask) -> None:
        """Grow the tables of these rows, if they may do what they are to do."""
        self._rows.grow(segments)
        reached = segments.starts + segments.counts == self._rows.total[segments.rows]
        if (reached != sampling).any():
            msg = "a request samples before its last known token, or reaches it and does not"
            raise PlanError(msg)

    def _advance(self, step: Step, drawn: Ints) -> None:
        """One token more for each, in place."""
        inputs, rows = step.inputs, step.segments.rows
        inputs.tokens[:] = drawn
        inputs.positions += 1
        inputs.slots += 1
        inputs.context += 1
        crossing = np.flatnonzero(inputs.positions % self._size == 0)
        if not len(crossing):
            return
        column = inputs.positions[crossing] // self._size
        blocks = self._rows.extend(rows[crossing])
        inputs.slots[crossing] = blocks.astype(np.int64) * self._size
        width = int(column.max()) + 1
        if width > inputs.table.shape[1]:
            inputs.table = self._rows.table[rows, : width + _SPARE_BLOCKS]
        else:
            inputs.table[crossing, column] = blocks


def _joined(first: Sequence[int], rest: Ints) -> Ints:
    return np.concatenate((np.array(first, dtype=np.int64), rest))
