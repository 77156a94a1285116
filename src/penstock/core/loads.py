"""What a plan computes, for policies that learn how long steps take."""

from __future__ import annotations

from penstock.core.admission import Draft
from penstock.core.entry import DecodeSet
from penstock.core.forecast.latency.base import StepLoad


def load_of(draft: Draft, decode: DecodeSet | None) -> StepLoad:
    """Of a plan in the making; ``decode``: who gets a token, before they get it.

    One token of a prompt costs what a decoding request does, and counts as one.
    """
    decoding = context = longest = prefill = chunks = 0
    work = 0.0
    if decode is not None:
        _, prompt, generated, _ = decode.columns()
        attended = prompt + generated
        decoding, context = len(attended), int(attended.sum())
        longest = int(attended.max())
    for _, start, tokens in draft.chunks:
        if tokens == 1:
            decoding, context = decoding + 1, context + start + 1
            longest = max(longest, start + 1)
        else:
            prefill, chunks = prefill + tokens, chunks + 1
            work += tokens * (start + tokens / 2)
    return StepLoad(decoding, context, prefill, work, chunks, longest)
