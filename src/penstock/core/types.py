"""The protocol between whoever has requests, the scheduler, and an engine.

Everything here is data.  A runtime hands :class:`Request` objects to the
scheduler, the scheduler emits numbered :class:`StepPlan` objects, an engine
runs them and answers with :class:`StepResult` objects.  Nothing in a plan or a
result refers to a clock, a device or a token's text.

Units: tokens are counts, times are seconds on the clock that the runtime
injects, KV memory is counted in blocks of ``Capabilities.block_size`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

RequestId: TypeAlias = str
PrefixKey: TypeAlias = bytes
"""Content address of one full KV block: it names the block *and all before it*."""


class FinishReason(StrEnum):
    """How a request ended.  Each request ends exactly once, with one of these."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # its cap on output tokens
    REJECTED = "rejected"  # never admitted: it cannot be served, or not in time
    EXPIRED = "expired"  # a deadline passed and its policy said to give up
    CANCELLED = "cancelled"  # the client left or asked to stop
    FAILED = "failed"  # the engine lost it


class Role(StrEnum):
    """What an instance is for, where there are several."""

    MIXED = "mixed"  # prompts and decoding
    PREFILL = "prefill"  # prompts, up to the first token
    DECODE = "decode"  # all that follows, with the KV that a prefill instance computed


class OnMiss(StrEnum):
    """What to do with a request whose SLO can no longer be met."""

    KEEP = "keep"  # serve it as if nothing had happened
    DEMOTE = "demote"  # serve it after everyone who can still be in time
    EXPIRE = "expire"  # end it with FinishReason.EXPIRED


@dataclass(frozen=True, slots=True)
class SLO:
    """A latency promise, in seconds.  ``None`` means "no promise on this".

    ``ttft``: arrival to first token, queueing included.  ``tpot``: mean time
    per output token after the first.  ``gap``: largest time between two
    consecutive tokens (MTPOT in the Past-Future paper).  ``e2e``: arrival to
    last token.

    Raises:
        ValueError: a bound is not a positive number.
    """

    ttft: float | None = None
    tpot: float | None = None
    gap: float | None = None
    e2e: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot", "gap", "e2e"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                msg = f"slo.{name} is {value!r}; it must be a positive number of seconds"
                raise ValueError(msg)

    def broken(
        self, ttft: float | None, tpot: float | None, gap: float | None, e2e: float | None
    ) -> tuple[str, ...]:
        """The bounds that an answer with these latencies broke, in this order.

        A bound on something it does not have (None: the gap of a single token) is kept, except
        that without a token those of ``ttft`` and ``e2e`` are broken.
        """
        had = (("ttft", ttft), ("tpot", tpot), ("gap", gap), ("e2e", e2e))
        broken = []
        for name, value in had:
            bound = getattr(self, name)
            if bound is None:
                continue
            if value > bound if value is not None else name in {"ttft", "e2e"}:
                broken.append(name)
        return tuple(broken)


@dataclass(frozen=True, slots=True)
class Request:
    """What a scheduler may know about a request.  Its true output length is not here.

    Attributes:
        prompt_tokens: length of the prompt, at least 1.
        cap: most output tokens it may produce (``max_tokens``), at least 1.
        arrival: when it reached the system, on the runtime's clock.
        priority: lower is served first; only the ``priority`` order reads it.
        slo_class: name of its class, for reports.
        prefix: keys of the prompt's full KV blocks, in order, for prefix reuse.
        generated: output tokens that it has already, from an instance that it was on before;
            they count towards ``cap``, which must be larger.
        batch: number of the static batch that it runs in; 0: of none.  Only policies with
            static batches read it.
        computed: tokens, from its first one on, whose KV comes along from there: fewer than it
            has.  An eviction loses that KV as well.
        first_token: when its first token came, on the runtime's clock, if it has tokens.

    Raises:
        ValueError: a count is out of range.
    """

    id: RequestId
    prompt_tokens: int
    cap: int
    arrival: float
    slo: SLO = field(default_factory=SLO)
    slo_class: str = "default"
    priority: int = 0
    on_miss: OnMiss = OnMiss.KEEP
    prefix: tuple[PrefixKey, ...] = ()
    generated: int = 0
    batch: int = 0
    computed: int = 0
    first_token: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "cap"):
            value = getattr(self, name)
            if value < 1:
                msg = f"request {self.id}: {name} is {value}; it must be at least 1"
                raise ValueError(msg)
        if not 0 <= self.generated < self.cap:
            msg = f"request {self.id}: generated is {self.generated}"
            raise ValueError(f"{msg}; it must be at least 0 and below its cap ({self.cap})")
        tokens = self.prompt_tokens + self.generated
        if not 0 <= self.computed < tokens:
            msg = f"request {self.id}: computed is {self.computed}"
            raise ValueError(f"{msg}; it must be at least 0 and below its tokens ({tokens})")


_COUNTS = (
    "kv_blocks",
    "block_size",
    "max_batch",
    "max_step_tokens",
    "max_request_tokens",
    "depth",
    "max_repeat",
)
_NOBODY: Mapping[RequestId, str] = MappingProxyType({})
_NO_KEYS: Mapping[RequestId, tuple[PrefixKey, ...]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do.  The scheduler respects every one of these.

    Attributes:
        kv_blocks: KV blocks there are.
        block_size: tokens per KV block; 1 is token-granular (TokenAttention).
        max_batch: most requests in one step.
        max_step_tokens: most tokens computed in one step.
        max_request_tokens: most prompt plus output tokens of one request.
        depth: plans that may be in flight (1: synchronous, 2: overlapped).
        prefix_cache: whether blocks can be shared between requests.
        max_repeat: how often it can run one plan before it asks for the next (decode only);
            more than 1 needs a depth of 1.
        swap_tokens: tokens of evicted requests whose KV it can keep in host memory.
    """

    kv_blocks: int
    block_size: int
    max_batch: int
    max_step_tokens: int
    max_request_tokens: int
    depth: int = 1
    prefix_cache: bool = False
    max_repeat: int = 1
    swap_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value < 1:
                msg = f"capabilities.{name} is {value}; it must be at least 1"
                raise ValueError(msg)
        if self.swap_tokens < 0:
            msg = f"capabilities.swap_tokens is {self.swap_tokens}; it must be at least 0"
            raise ValueError(msg)
        if self.max_repeat > 1 and self.depth > 1:
            msg = f"capabilities.max_repeat is {self.max_repeat}; it must be 1 with a depth above 1"
            raise ValueError(msg)

    @property
    def kv_tokens(self) -> int:
        """KV tokens there are."""
        return self.kv_blocks * self.block_size


class Drop(NamedTuple):
    """Give back all KV of a request before the step runs.

    ``final`` is False for an eviction: the request will start again, and recompute, or go on from
    the KV of its first ``swapped`` tokens, of which the engine takes a copy to host memory as its
    payload's KV.  ``publish`` names blocks of the request that stay behind as prefix cache: pairs
    of (index of the block in the request, its key).
    """

    id: RequestId
    final: bool
    publish: tuple[tuple[int, PrefixKey], ...] = ()
    swapped: int = 0


class Start(NamedTuple):
    """A request enters (again) with no KV of its own, or with what comes from elsewhere.

    ``cached`` are the keys of shared blocks that are its first blocks.  ``imported`` is how many
    tokens, from its first one on, have KV in its payload: of these the engine copies what is not
    in the cached blocks, and keeps the payload's KV no longer.  Its first :class:`Chunk` begins
    behind both.  ``tokens`` is how many tokens (prompt plus what it has generated) must have KV
    before it samples.
    """

    id: RequestId
    tokens: int
    cached: tuple[PrefixKey, ...] = ()
    imported: int = 0


class Chunk(NamedTuple):
    """Compute the KV of tokens ``start .. start + tokens - 1`` of a request.

    Token indices count the prompt and then the generated tokens.  With
    ``samples`` the chunk reaches the last known token and yields the next one.
    ``publish`` names blocks which are full once this step has run and may be
    shared from the next plan on.
    """

    id: RequestId
    start: int
    tokens: int
    samples: bool
    publish: tuple[tuple[int, PrefixKey], ...] = ()


class StepPlan(NamedTuple):
    """One forward pass.  An engine applies the fields in the order given here.

    Attributes:
        number: consecutive, from 1.
        drops: KV given back.
        forget: shared blocks nobody uses, taken out of the prefix cache.
        starts: requests that enter; each has its first chunk in this plan or a later one.
        chunks: prompt (or recompute) work of this step.
        decode: requests that compute their newest token's KV and yield one
            token each.  The very same tuple object as in the previous plan
            when nothing changed, so an engine may compare by identity.
        repeat: how often an engine may run it, drops and forgets only once, before it comes
            back for another plan: as often as every plan to come would be this one.  It must
            come back after the first run in which a request stops or fails, and after the
            first that ends at ``until`` (seconds on the runtime's clock) or later.
            1 unless ``Capabilities.max_repeat`` says that the engine can do it.
        until: see ``repeat``.
        capped: whose cap the token of this step reaches, where blocks are shared: the engine
            names the keys of their full blocks (:attr:`StepResult.capped`).
    """

    number: int
    drops: tuple[Drop, ...]
    forget: tuple[PrefixKey, ...]
    starts: tuple[Start, ...]
    chunks: tuple[Chunk, ...]
    decode: tuple[RequestId, ...]
    repeat: int = 1
    until: float = math.inf
    capped: tuple[RequestId, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens computed in this step."""
        return len(self.decode) + sum(chunk.tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Token:
    """One output token and, where asked for, its log probability and the top alternatives."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class StepResult(NamedTuple):
    """What came of a plan.

    Attributes:
        number: the plan's number.
        seconds: measured (or modelled) duration of the step.
        tokens: one per sampling chunk and decoding request.  An engine that
            has no tokens (the simulator) leaves it empty.
        stopped: requests that ended by themselves, with this step's token as their last.
            The value holds the keys of all their full blocks, or nothing if
            the engine does not share blocks.
        failed: requests the engine had to give up, with the reason.
        capped: the keys of all full blocks of the requests that :attr:`StepPlan.capped` names.
            Those that stopped or failed by themselves are not among them.
        steps: how often it ran the plan, at most ``StepPlan.repeat``; ``seconds`` is for all of
            them, ``stopped`` and ``tokens`` are the last one's.
    """

    number: int
    seconds: float
    tokens: Mapping[RequestId, Token]
    stopped: Mapping[RequestId, tuple[PrefixKey, ...]]
    failed: Mapping[RequestId, str] = _NOBODY
    steps: int = 1
    capped: Mapping[RequestId, tuple[PrefixKey, ...]] = _NO_KEYS


class Ended(NamedTuple):
    """A request's end: exactly one per request ever added."""

    id: RequestId
    reason: FinishReason
    output_tokens: int
    evictions: int
    detail: str = ""


class RequestError(ValueError):
    """A request that cannot be served as it stands.  ``field`` names what is wrong."""

    def __init__(self, field_name: str, message: str) -> None:
        super().__init__(message)
        self.field = field_name
