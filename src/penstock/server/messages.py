"""What the front end and the engine process say to each other.

Commands go down, events come up, each as one msgpack message over a Unix
socket.  Times are readings of the system's monotonic clock, which both
processes share.  A step is one message however many requests it serves, so the
cost of the process boundary does not grow with the batch.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import msgspec

from penstock.core.engine import Work
from penstock.core.memory import prefix_keys
from penstock.core.sampling import SamplingParams
from penstock.core.types import SLO, Capabilities, FinishReason, OnMiss, PrefixKey, Request

Prices: TypeAlias = tuple[float, float, float, float]
"""Fitted seconds: per step, per prompt token, per decoding request, per KV token it attends to."""


class Sampling(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """:class:`penstock.core.sampling.SamplingParams` on the wire."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    logprobs: int | None
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool

    @classmethod
    def pack(cls, params: SamplingParams) -> Sampling:
        """Take every field over by name, so that a new one cannot be forgotten."""
        values = {name: getattr(params, name) for name in cls.__struct_fields__}
        values["logit_bias"] = dict(params.logit_bias)
        return cls(**values)

    def unpack(self) -> SamplingParams:
        """The parameters as engines know them."""
        return SamplingParams(**{name: getattr(self, name) for name in self.__struct_fields__})


class Add(msgspec.Struct, tag="add", array_like=True, frozen=True, gc=False):
    """A request, or a slice of one.

    Its prefix keys are computed by the engine process, which has the time.
    """

    id: str
    prompt: list[int]
    cap: int
    arrival: float
    ttft: float | None
    tpot: float | None
    gap: float | None
    e2e: float | None
    slo_class: str
    priority: int
    on_miss: OnMiss
    sampling: Sampling
    trace_length: int | None
    generated: list[int]
    batch: int
    computed: int = 0
    first_token: float | None = None
    keep_kv: bool = False
    stream_kv: bool = False

    @classmethod
    def pack(cls, request: Request, work: Work) -> Add:
        """Both halves of a request in one message."""
        slo = request.slo
        return cls(
            id=request.id,
            prompt=list(work.prompt),
            cap=request.cap,
            arrival=request.arrival,
            ttft=slo.ttft,
            tpot=slo.tpot,
            gap=slo.gap,
            e2e=slo.e2e,
            slo_class=request.slo_class,
            priority=request.priority,
            on_miss=request.on_miss,
            sampling=Sampling.pack(work.sampling),
            trace_length=work.trace_length,
            generated=list(work.generated),
            batch=request.batch,
            computed=request.computed,
            first_token=request.first_token,
            keep_kv=work.keep_kv,
            stream_kv=work.stream_kv,
        )

    def unpack(self, capabilities: Capabilities) -> tuple[Request, Work]:
        """The scheduler's and the engine's half of the request."""
        keys = (
            prefix_keys(self.prompt, capabilities.block_size) if capabilities.prefix_cache else ()
        )
        sampling = self.sampling.unpack()
        length, generated = self.trace_length, self.generated
        work = Work(
            self.prompt,
            sampling,
            length,
            generated,
            keep_kv=self.keep_kv,
            stream_kv=self.stream_kv,
        )
        return self.request(keys), work

    def request(self, prefix: tuple[PrefixKey, ...] = ()) -> Request:
        """The scheduler's half, with these prefix keys."""
        return Request(
            id=self.id,
            prompt_tokens=len(self.prompt),
            cap=self.cap,
            arrival=self.arrival,
            slo=SLO(self.ttft, self.tpot, self.gap, self.e2e),
            slo_class=self.slo_class,
            priority=self.priority,
            on_miss=self.on_miss,
            prefix=prefix,
            generated=len(self.generated),
            batch=self.batch,
            computed=self.computed,
            first_token=self.first_token,
        )


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True, gc=False):
    """End a request from outside: its client left, or a stop string came up."""

    id: str
    reason: FinishReason


class Explain(msgspec.Struct, tag="explain", array_like=True, frozen=True, gc=False):
    """Ask why a request waits; answered by :class:`Explained` with the same ticket."""

    ticket: int
    id: str


class Stop(msgspec.Struct, tag="stop", array_like=True, frozen=True, gc=False):
    """Close the engine and leave."""


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True, gc=False):
    """The engine is loaded; what it can do."""

    kv_blocks: int
    block_size: int
    max_batch: int
    max_step_tokens: int
    max_request_tokens: int

    @property
    def kv_tokens(self) -> int:
        """KV tokens there are."""
        return self.kv_blocks * self.block_size


class End(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request's end, from the engine process."""

    id: str
    reason: FinishReason
    output_tokens: int
    evictions: int
    detail: str


class Gauges(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The scheduler's books after a step, for metrics and for admission at the edge.

    Attributes:
        received: requests taken in since the process began; the front end
            knows by it which of those it sent are counted here.
        kv_usage: share of the KV memory that requests hold, 0 to 1.
        rate: admissions per second out of the queue; None while unknown.
        prices: what steps cost here, for a front that plans slices; None if nobody asked.
        host_tokens: tokens of evicted requests whose KV is in host memory.
    """

    received: int
    running: int
    waiting: int
    waiting_tokens: int
    kv_usage: float
    evictions: int
    rate: float | None
    prices: Prices | None = None
    host_tokens: int = 0


class Swapped(NamedTuple):
    """Tokens whose KV went to host memory, and came back from there."""

    out: int
    back: int


NOTHING_SWAPPED = Swapped(0, 0)


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True, gc=False):
    """What one step brought: tokens to deliver, then ends, then the books.

    Attributes:
        tokens: request id to its next token.
        details: log probability and top alternatives, only for who asked.
        seconds: duration of the step in the engine.
        planning: what the scheduler took to plan meanwhile, in seconds.
        swapped: since the last of these messages.
    """

    tokens: dict[str, int]
    details: dict[str, tuple[float, list[tuple[int, float]]]]
    ended: list[End]
    seconds: float
    planning: float
    gauges: Gauges
    swapped: Swapped = NOTHING_SWAPPED


class Refused(msgspec.Struct, tag="refused", array_like=True, frozen=True, gc=False):
    """A request that can never be served as it stands; ``field`` names what is wrong."""

    id: str
    field: str
    message: str


class Explained(msgspec.Struct, tag="explained", array_like=True, frozen=True, gc=False):
    """Why a request waits, in words."""

    ticket: int
    text: str


class Brought(msgspec.Struct, tag="brought", array_like=True, frozen=True, gc=False):
    """The KV of a request has come from another instance: so many bytes."""

    id: str
    bytes: int


class Missed(msgspec.Struct, tag="missed", array_like=True, frozen=True, gc=False):
    """The KV of a request did not come, so it was not taken in."""

    id: str
    message: str


Command: TypeAlias = Add | Cancel | Explain | Stop
Event: TypeAlias = Ready | Step | Refused | Explained | Brought | Missed
