"""The one interface behind which models run: native, simulated, scripted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from penstock.core.sampling import SamplingParams
from penstock.core.types import Capabilities, RequestId, StepPlan, StepResult

_DEFAULT = SamplingParams()


class KV(Protocol):
    """KV of a request's first tokens on its way from one engine to another.

    An engine takes what an engine of its own kind and model gave, and refuses all else.

    Attributes:
        tokens: how many.
        bytes: what it weighs.
    """

    @property
    def tokens(self) -> int:
        """See the class."""
        ...

    @property
    def bytes(self) -> int:
        """See the class."""
        ...


class Work(NamedTuple):
    """What an engine must know about a request and a scheduler must not.

    Attributes:
        prompt: token ids.
        sampling: how its tokens are chosen.
        generated: output tokens that it has already, from an instance that it was on before.
            The next token is the one that would have come there: penalties count them, and the
            random stream goes on behind them.
        kv: KV of its first tokens, as :meth:`Engine.take_kv` gave it on the instance that it was
            on before; needed if a plan starts it with ``imported`` tokens.
        keep_kv: whether the runtime is to call :meth:`Engine.take_kv` when its cap ends it.
        stream_kv: whether, besides, it is to copy what each prompt chunk computed at once; what is
            copied at the end is then only the rest.
        trace_length: benchmarks only: end it with STOP at exactly this many
            output tokens, whatever the model says.  No policy but the oracle
            ever sees it.
    """

    prompt: Sequence[int]
    sampling: SamplingParams = _DEFAULT
    trace_length: int | None = None
    generated: Sequence[int] = ()
    kv: KV | None = None
    keep_kv: bool = False
    stream_kv: bool = False


class Ticket(NamedTuple):
    """A plan in flight."""

    number: int


@runtime_checkable
class Engine(Protocol):
    """Runs plans in the order in which they are submitted.

    An engine never decides anything: it places KV blocks, runs the model,
    samples, and says which requests stopped by themselves.  It keeps one
    block table per started request, and shares blocks only as plans say: the
    scheduler counts blocks, the engine places them.

    Contract, step by step: apply ``drops`` (a final one also forgets the
    payload), ``forget``, ``starts``, then run ``chunks`` and ``decode``.  A
    request's table grows by one block whenever its next token needs one; the
    scheduler guarantees that there is room.  A plan without work
    (``plan.tokens == 0``) is bookkeeping only.  A request that stopped by
    itself may be named by one more plan when ``depth`` is 2; the runtime
    throws that token away.  The cap on output tokens is the scheduler's
    business: it simply stops naming the request and drops it.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the scheduler may ask of it; constant over its life."""
        ...

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take in a request's payload, before the first plan that names it."""
        ...

    def discard(self, request_id: RequestId) -> None:
        """Forget a payload that no plan has started, or whose final drop has been applied."""
        ...

    def take_kv(self, request_id: RequestId, start: int = 0, end: int | None = None) -> KV | None:
        """Copy KV of a request out of KV memory, to go on with it on another instance.

        A plan in flight that names the request computes other tokens.  None if these have no KV:
        it has not started, has not come that far, or a drop of it has been applied.

        Args:
            start, end: of which tokens; None: to the last that has KV.
        """
        ...

    def submit(self, plan: StepPlan) -> Ticket:
        """Begin a step.  At most ``capabilities.depth`` tickets are open at a time."""
        ...

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a step.  Tickets are collected in the order of submission."""
        ...

    def close(self) -> None:
        """Give everything back.  Idempotent."""
        ...
