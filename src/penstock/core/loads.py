"""What a plan computes, for those who learn or predict how long steps take."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.core.entry import DecodeSet
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.types import Chunk


def load_of(
    decoding: int, context: int, longest: int, chunks: Iterable[tuple[int, int]]
) -> StepLoad:
    """A step of decoding requests and chunks.

    Args:
        decoding, context, longest: of those that decode; see :class:`StepLoad`.
        chunks: (first token, tokens) of each.  One token costs what a decoding request does, and
            counts as one: so begins a request whose KV came from another instance.
    """
    prefill = count = 0
    work = 0.0
    for start, tokens in chunks:
        if tokens == 1:
            decoding, context = decoding + 1, context + start + 1
            longest = max(longest, start + 1)
        else:
            prefill, count = prefill + tokens, count + 1
            work += tokens * (start + tokens / 2)
    return StepLoad(decoding, context, prefill, work, count, longest)


def load_of_draft(drafted: Iterable[Chunk], decode: DecodeSet | None) -> StepLoad:
    """Of a plan in the making; ``decode``: who gets a token, before they get it."""
    chunks = ((chunk.start, chunk.tokens) for chunk in drafted)
    if decode is None:
        return load_of(0, 0, 0, chunks)
    _, prompt, generated, _ = decode.columns()
    attended = prompt + generated
    return load_of(len(attended), int(attended.sum()), int(attended.max()), chunks)
