"""From the prices that instances measure to the prices of slices."""

from __future__ import annotations

from collections.abc import Collection

from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.slices import SliceCost
from penstock.server.messages import Prices

NEUTRAL: Prices = (1e-2, 1e-4, 1e-4, 0.0)
"""Until an instance has said something: only the ratio of two batches matters then."""


def slice_cost(
    measured: Collection[Prices], *, slice_tokens: int, room: int, most: int, block_size: int
) -> SliceCost:
    """What slices cost on the average of these instances.

    Args:
        measured: of each instance that has said something.
        slice_tokens: a slice's length.
        room: KV tokens that a batch may hold.
        most: most requests of a batch.
        block_size: KV tokens in a block.

    Raises:
        ValueError: a number is out of range.
    """
    known = measured or (NEUTRAL,)
    step, token, request, context = (
        sum(column) / len(known) for column in zip(*known, strict=True)
    )
    return SliceCost(
        Bilinear((token, 0.0, 0.0, step), (context, request, 0.0, step)),
        max(1, slice_tokens),
        max(1, room),
        most,
        block_size,
    )
