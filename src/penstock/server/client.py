"""The front end's half of the engine: what was sent, what came back, what is open.

Every open request of every response is a :class:`~penstock.server.choice.Choice`
in one dictionary here.  A step's message is dispatched in one go, without a
task switch per token: tokens become text, responses with news are woken.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol, TypeAlias

from penstock.core.engine import Work
from penstock.core.gate import Limits, Load, Refusal, gate
from penstock.core.types import FinishReason, Request
from penstock.server.choice import Choice
from penstock.server.errors import ApiError, invalid, unavailable
from penstock.server.messages import (
    Add,
    Cancel,
    End,
    Event,
    Explain,
    Explained,
    Gauges,
    Ready,
    Refused,
    Step,
)
from penstock.server.pacing import Pacer
from penstock.server.supervisor import Backend

Detail: TypeAlias = tuple[float, list[tuple[int, float]]]
"""A token's log probability and the top alternatives."""

_EXPLAIN_TIMEOUT = 5.0


class Observer(Protocol):
    """Who counts: :class:`penstock.server.metrics.Metrics`."""

    def on_step(self, step: Step) -> None:
        """A step's message came, before its tokens are delivered."""
        ...

    def on_token(self, choice: Choice, gap: float | None) -> None:
        """A token came; ``gap`` is the time since the previous one, None for the first."""
        ...

    def on_end(self, choice: Choice) -> None:
        """A request ended, however."""
        ...


class EngineClient:
    """Sends requests to the engine process and brings their tokens home.

    Args:
        limits: of the waiting queue.
        observer: who counts.
        paced: tokens that come early are released at the pace of their TPOT promise.
    """

    def __init__(self, limits: Limits, observer: Observer, *, paced: bool = False) -> None:
        self._limits = limits
        self._observer = observer
        self._backend: Backend | None = None
        self._open: dict[str, Choice] = {}
        self._pacer = Pacer(time.monotonic) if paced else None
        self._tickets = itertools.count()
        self._explaining: dict[int, asyncio.Future[str]] = {}
        # Requests sent to this process and not yet counted in its books: their prompt lengths.
        self._unseen: deque[int] = deque()
        self._sent = 0
        self.ready: Ready | None = None
        self.gauges: Gauges | None = None

    def attach(self, backend: Backend) -> None:
        """Say through whom to send; before the first request."""
        self._backend = backend

    @property
    def alive(self) -> bool:
        """Whether an engine is loaded and takes requests."""
        return self._backend is not None and self._backend.ready

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def load(self) -> Load:
        """The scheduler's queue as far as it is known here, plus what it has not counted yet."""
        return self._load_with((), self.gauges, self._unseen)

    def _load_with(self, coming: Sequence[int], gauges: Gauges | None, sent: Iterable[int]) -> Load:
        """The load if requests with these prompt lengths had been sent as well.

        Args:
            gauges: what the engine said last, or None for an idle one.
            sent: prompt lengths of requests that it had not counted by then.
        """
        rate = gauges.rate if gauges else None
        waiting = gauges.waiting if gauges else 0
        tokens = gauges.waiting_tokens if gauges else 0
        unseen = [*sent, *coming]
        if waiting == 0 and self.ready is not None:
            # Nobody waits, so the first of them start at once.
            running = gauges.running if gauges else 0
            del unseen[: max(0, self.ready.max_batch - running)]
        return Load(waiting + len(unseen), tokens + sum(unseen), rate)

    def refuse(self, requests: Sequence[Request]) -> Refusal | None:
        """Whether the requests of one response may enter the queue together."""
        return self._refuse(requests, self.gauges, self._unseen)

    def never(self, requests: Sequence[Request]) -> Refusal | None:
        """Whether they are refused even where nobody else is."""
        return self._refuse(requests, None, ())

    def _refuse(
        self, requests: Sequence[Request], gauges: Gauges | None, sent: Iterable[int]
    ) -> Refusal | None:
        coming: list[int] = []
        for request in requests:
            refusal = gate(self._load_with(coming, gauges, sent), request, self._limits)
            if refusal is not None:
                return refusal
            coming.append(request.prompt_tokens)
        return None

    def submit(self, choice: Choice, request: Request, work: Work) -> None:
        """Send a request that was not refused.

        Raises:
            ApiError: 503, the engine process is not running.
        """
        if self._backend is None or not self.alive:
            raise unavailable("the engine is not ready", "engine_not_ready")
        self._backend.send(Add.pack(request, work))
        self._open[choice.id] = choice
        self._unseen.append(request.prompt_tokens)
        self._sent += 1

    def cancel(self, choice: Choice, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request from here; nothing happens if it has ended."""
        if self._open.pop(choice.id, None) is None:
            return
        if self._pacer is not None:
            self._pacer.forget(choice)
        choice.end(reason, "", time.monotonic(), 0.0)
        self._observer.on_end(choice)
        if self._backend is not None and self.alive:
            self._backend.send(Cancel(choice.id, reason))

    async def explain(self, request_id: str) -> str | None:
        """Why a request waits, in words; None if it is not open."""
        if request_id not in self._open or self._backend is None or not self.alive:
            return None
        ticket = next(self._tickets)
        answer = self._explaining[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._backend.send(Explain(ticket, request_id))
            return await asyncio.wait_for(answer, _EXPLAIN_TIMEOUT)
        except TimeoutError:
            return "the engine is in a long step and has not answered yet"
        finally:
            del self._explaining[ticket]

    # -- what the engine process says ------------------------------------------------------

    def on_ready(self, ready: Ready) -> None:
        """A new process: nothing has been sent to it."""
        self.ready = ready
        self.gauges = None
        self._unseen.clear()
        self._sent = 0

    def on_event(self, event: Event) -> None:
        """Dispatch one message."""
        match event:
            case Step():
                self._on_step(event, time.monotonic())
            case Refused():
                choice = self._open.pop(event.id, None)
                if choice is not None:
                    self._fail(choice, invalid(event.field, event.message))
            case Explained():
                answer = self._explaining.get(event.ticket)
                if answer is not None and not answer.done():
                    answer.set_result(event.text)

    def on_death(self, status: int) -> None:
        """The process is gone and all it held: everyone is told at once."""
        self.gauges = None
        self._unseen.clear()
        error = unavailable(
            f"the engine process ended unexpectedly (status {status}) and is being restarted",
            "engine_died",
        )
        self.fail_all(error)

    def fail_all(self, error: ApiError) -> None:
        """End every open request with an error, here and in the engine."""
        if self._pacer is not None:
            for choice in list(self._open.values()):
                self._pacer.flush(choice)
        choices = list(self._open.values())
        self._open.clear()
        for choice in choices:
            self._fail(choice, error)
            if self._backend is not None and self.alive:
                self._backend.send(Cancel(choice.id, FinishReason.CANCELLED))

    def _fail(self, choice: Choice, error: ApiError) -> None:
        choice.fail(error, time.monotonic())
        self._observer.on_end(choice)

    def _on_step(self, step: Step, now: float) -> None:
        self.gauges = step.gauges
        while len(self._unseen) > self._sent - step.gauges.received:
            self._unseen.popleft()
        self._observer.on_step(step)
        details = step.details
        for request_id, token_id in step.tokens.items():
            choice = self._open.get(request_id)
            if choice is None:
                continue  # cancelled while the step ran
            if self._pacer is None:
                self._token(choice, token_id, details.get(request_id), now)
            else:
                tell = partial(self._token, choice, token_id, details.get(request_id))
                self._pacer.token(choice, now, tell)
        for end in step.ended:
            choice = self._open.get(end.id)
            if choice is None:
                continue
            if self._pacer is None:
                self._end(choice, end, now)
            else:
                self._pacer.end(choice, now, partial(self._end, choice, end))

    def _token(self, choice: Choice, token: int, detail: Detail | None, now: float) -> None:
        """Deliver a token."""
        if choice.ended:
            return
        gap = now - choice.times.last if choice.tokens else None
        stopped = choice.token(token, detail, now)
        self._observer.on_token(choice, gap)
        if stopped:
            self.cancel(choice, FinishReason.STOP)

    def _end(self, choice: Choice, end: End, now: float) -> None:
        """Deliver a request's end."""
        if self._open.pop(choice.id, None) is not None:
            choice.evictions = end.evictions
            choice.end(end.reason, end.detail, now, self.load.predicted_wait)
            self._observer.on_end(choice)
