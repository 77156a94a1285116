"""Snapshots made by hand, to ask policies without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.core.snapshot import Candidate, Columns, Ints, Snapshot
from penstock.core.types import Request


@dataclass(frozen=True)
class Row:
    """A request that holds memory."""

    prompt: int
    generated: int
    cap: int
    shared: int = 0
    lag: int = 0
    seq: int | None = None


def ints(values: Sequence[int]) -> Ints:
    """A read-only int64 array."""
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array


def columns(rows: Sequence[Row]) -> Columns:
    """The rows as a policy sees them, named r0, r1 and so on."""
    return Columns(
        tuple(f"r{index}" for index in range(len(rows))),
        ints([index if row.seq is None else row.seq for index, row in enumerate(rows)]),
        ints([row.prompt for row in rows]),
        ints([row.generated for row in rows]),
        ints([row.cap for row in rows]),
        ints([row.shared for row in rows]),
        ints([row.lag for row in rows]),
    )


def snapshot(
    rows: Sequence[Row] = (),
    *,
    capacity: int = 100,
    block_size: int = 1,
    shared: int = 0,
    lingering: int = 0,
    overlap: int = 0,
    now: float = 0.0,
) -> Snapshot:
    """A view of such rows; those without a lag decode."""
    made = columns(rows)
    own = sum(-(-(row.prompt + row.generated - 1 - row.shared) // block_size) for row in rows)
    return Snapshot(
        now=now,
        plan=1,
        capacity=capacity,
        block_size=block_size,
        used=own + shared + lingering,
        shared=shared,
        lingering=lingering,
        overlap=overlap,
        waiting=1,
        running=len(rows),
        decoding=sum(not row.lag for row in rows),
        reserved=sum(-(-(row.prompt + row.cap) // block_size) for row in rows),
        caps_bind=True,
        gather=lambda count: made,  # noqa: ARG005
    )


def candidate(
    prompt: int,
    cap: int,
    *,
    name: str = "new",
    generated: int = 0,
    shared: int = 0,
    lag: int = 0,
    block_size: int = 1,
    seq: int = 1000,
) -> Candidate:
    """The head of the queue."""
    blocks = -(-(prompt + generated) // block_size) - shared // block_size
    return Candidate(
        request=Request(name, prompt, cap, 0.0),
        seq=seq,
        generated=generated,
        evictions=1 if generated else 0,
        shared=shared,
        blocks=blocks,
        lag=lag,
        most_blocks=-(-(prompt + cap) // block_size),
    )
