"""What a policy may look at: read-only, and without a single true output length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.core.types import Request, RequestId

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@lru_cache(maxsize=64)
def nothing(count: int) -> Ints:
    """So many zeros, not writeable."""
    zeros = np.zeros(count, dtype=np.int64)
    zeros.flags.writeable = False
    return zeros


@dataclass(frozen=True, slots=True)
class Columns:
    """The requests that hold KV memory, one row each.

    All arrays are int64, of one length, and not writeable.

    Attributes:
        ids: request ids by row.
        seq: order of arrival; larger is later.
        prompt: prompt tokens.
        generated: output tokens it has (in plans so far).
        cap: most output tokens it may produce.
        shared: tokens of it in blocks that another request holds too.
        lag: steps of prefill left after the current one; 0 while decoding.
    """

    ids: tuple[RequestId, ...]
    seq: Ints
    prompt: Ints
    generated: Ints
    cap: Ints
    shared: Ints
    lag: Ints

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> Ints:
        """KV tokens each holds for itself once the current step has run."""
        return self.prompt + self.generated - self.shared


class Prompts(NamedTuple):
    """The requests that have tokens to compute before their next one, one row each.

    Attributes:
        seq: order of arrival, int64.
        arrival: seconds, float64.
        ttft: promised seconds to the first token, float64; infinite: nothing was promised.
        tokens: tokens that must have KV before it yields one, int64.
        computed: tokens of those that have it, int64.
        generated: output tokens that it has, int64: above 0 for those that were evicted or come
            from another instance.
    """

    seq: Ints
    arrival: Floats
    ttft: Floats
    tokens: Ints
    computed: Ints
    generated: Ints

    @property
    def left(self) -> Ints:
        """Tokens to compute."""
        return self.tokens - self.computed


class Decoding(NamedTuple):
    """The requests that decode, or would, one row each.

    Attributes:
        context: tokens that its next step attends to, int64.
        generated: output tokens that it has, int64.
        first: when its first token came, float64, seconds.
        latest: when its latest token came, float64, seconds.
        tpot: promised seconds per token, float64; infinite: nothing was promised.
        gap: promised largest gap, in seconds, float64; infinite: nothing was promised.
    """

    context: Ints
    generated: Ints
    first: Floats
    latest: Floats
    tpot: Floats
    gap: Floats


class Candidate(NamedTuple):
    """The request at the head of the order, asking for KV memory.

    Attributes:
        request: the request itself.
        seq: order of arrival.
        generated: output tokens it had before it was evicted, else 0.
        evictions: how often it was evicted.
        shared: tokens of it in blocks that another request holds already.
        blocks: KV blocks that leave the free pile if it is admitted.
        lag: steps of prefill after its first one.
        most_blocks: blocks for its prompt and its cap.
    """

    request: Request
    seq: int
    generated: int
    evictions: int
    shared: int
    blocks: int
    lag: int
    most_blocks: int

    @property
    def tokens(self) -> int:
        """KV tokens it needs for itself before it yields its next token."""
        return self.request.prompt_tokens + self.generated - self.shared


class Snapshot(NamedTuple):
    """The state before a step.

    Attributes:
        now: seconds on the runtime's clock.
        plan: number of the plan being made.
        capacity, block_size: KV blocks there are, and tokens in each.
        used: blocks that requests hold (shared ones once).
        shared: blocks of ``used`` that two or more requests hold.
        lingering: blocks of ``used`` that free themselves when steps in flight are confirmed.
        overlap: steps for which a request's memory stays taken after its last one, where
            plans overlap: until its end is known, then until the plans made meanwhile are
            confirmed.
        waiting, running, decoding: numbers of requests.
        reserved: blocks that the running requests would hold with prompts and caps in full,
            shared blocks counted for each holder: no forecast of them can exceed it, with
            ``shared`` and ``lingering`` added.
        caps_bind: whether requests end at their cap; False in studies in which policies are
            told a cap that true lengths exceed.
        gather: makes :attr:`columns`, of so many requests: those who start later in the same
            plan come after them.
    """

    now: float
    plan: int
    capacity: int
    block_size: int
    used: int
    shared: int
    lingering: int
    overlap: int
    waiting: int
    running: int
    decoding: int
    reserved: int
    caps_bind: bool
    gather: Callable[[int], Columns]

    @property
    def columns(self) -> Columns:
        """The running requests."""
        return self.gather(self.running)
