"""The loop that every runtime turns: plan a step, run it, write down what happened."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from penstock.core.engine import KV, Engine, Ticket, Work
from penstock.core.scheduler import Scheduler
from penstock.core.stats import Stats
from penstock.core.types import Chunk, Ended, FinishReason, Request, RequestId, Token

_NOBODY: Mapping[RequestId, KV | None] = MappingProxyType({})
_NOTHING: Mapping[RequestId, KV] = MappingProxyType({})


class StepOutput(NamedTuple):
    """What a step brought to the outside: valid tokens, then ends.

    ``tokens`` holds only tokens to deliver: those of requests that had already
    ended are left out.  A request's last token is in ``tokens`` of the same
    output whose ``ended`` names it.  ``seconds`` is what the engine measured for the
    step, ``planning`` what the scheduler took for the plans made meanwhile, ``steps`` how
    often the engine ran the plan.  ``kept`` is the KV of those in ``ended`` whose cap
    ended them and whose work said to keep it; ``parts`` is what the step's chunks added for
    those whose work said to stream it, and ``kept`` then only what came after the last part.
    """

    tokens: Mapping[RequestId, Token]
    ended: tuple[Ended, ...]
    seconds: float
    planning: float
    steps: int = 1
    kept: Mapping[RequestId, KV | None] = _NOBODY
    parts: Mapping[RequestId, KV] = _NOTHING


class Runtime:
    """Binds a scheduler, an engine and a clock.  Not thread-safe: one thread turns it.

    Args:
        clock: returns seconds; only differences matter.
    """

    def __init__(self, scheduler: Scheduler, engine: Engine, clock: Callable[[], float]) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self._clock = clock
        self._flight: deque[tuple[Ticket, tuple[Chunk, ...]]] = deque()
        self._planning = 0.0
        # Whose KV is wanted when they end, and how many tokens of it went ahead; -1: none shall.
        self._keeping: dict[RequestId, int] = {}

    def add(self, request: Request, work: Work) -> None:
        """Take a request in.

        Raises:
            RequestError: it can never be served here (names the field); nothing has changed.
        """
        if len(work.prompt) != request.prompt_tokens:
            msg = (
                f"request {request.id}: prompt_tokens is {request.prompt_tokens} "
                f"but the prompt has {len(work.prompt)} tokens"
            )
            raise ValueError(msg)
        if len(work.generated) != request.generated:
            msg = (
                f"request {request.id}: generated is {request.generated} "
                f"but its payload has {len(work.generated)} generated tokens"
            )
            raise ValueError(msg)
        self.scheduler.validate(request)
        self.engine.open(request.id, work)
        if work.keep_kv:
            self._keeping[request.id] = 0 if work.stream_kv else -1
        self.scheduler.enter(request, work.trace_length)

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.CANCELLED) -> bool:
        """End a request from outside; False if it has already ended or never was."""
        return self.scheduler.cancel(request_id, reason)

    def step(self) -> StepOutput | None:
        """Fill the pipeline, then collect the oldest step; None when there is nothing to do."""
        self.begin()
        return self.finish()

    def begin(self) -> bool:
        """Fill the pipeline; whether any step is in flight."""
        while len(self._flight) < self.engine.capabilities.depth:
            began = self._clock()
            plan = self.scheduler.plan(began)
            self._planning += self._clock() - began
            if plan is None:
                break
            self._flight.append((self.engine.submit(plan), plan.chunks))
        return bool(self._flight)

    def finish(self) -> StepOutput | None:
        """Collect the oldest step; None if there is none and nobody has ended."""
        planning, self._planning = self._planning, 0.0
        if not self._flight:
            ended = self._take_ended()
            return StepOutput({}, ended, 0.0, planning, 0, self._keep(ended)) if ended else None
        ticket, chunks = self._flight.popleft()
        result = self.engine.collect(ticket)
        stale = self.scheduler.confirm(result)
        tokens = result.tokens
        if stale:
            tokens = {key: value for key, value in tokens.items() if key not in stale}
        ended = self._take_ended()
        kept = self._keep(ended)
        parts = self._part(chunks) if self._keeping else _NOTHING
        return StepOutput(tokens, ended, result.seconds, planning, result.steps, kept, parts)

    def stats(self) -> Stats:
        """The scheduler's state in numbers."""
        return self.scheduler.stats(self._clock())

    def _keep(self, ended: tuple[Ended, ...]) -> Mapping[RequestId, KV | None]:
        """Copy the KV of those that go on elsewhere, before a plan drops them."""
        if not self._keeping:
            return _NOBODY
        kept: dict[RequestId, KV | None] = {}
        for end in ended:
            ahead = self._keeping.pop(end.id, None)
            if ahead is not None and end.reason is FinishReason.LENGTH:
                kept[end.id] = self.engine.take_kv(end.id, max(0, ahead))
        return kept

    def _part(self, chunks: tuple[Chunk, ...]) -> Mapping[RequestId, KV]:
        """Copy what these chunks added of those whose KV goes ahead.

        What was evicted computes the same again, and has nothing new until it is past that.
        """
        parts: dict[RequestId, KV] = {}
        for chunk in chunks:
            ahead, end = self._keeping.get(chunk.id, -1), chunk.start + chunk.tokens
            if 0 <= ahead < end:
                part = self.engine.take_kv(chunk.id, ahead, end)
                if part is not None:
                    parts[chunk.id] = part
                    self._keeping[chunk.id] = end
        return parts

    def _take_ended(self) -> tuple[Ended, ...]:
        ended = self.scheduler.take_ended()
        for request_id in self.scheduler.take_forgotten():
            self.engine.discard(request_id)
        return ended
