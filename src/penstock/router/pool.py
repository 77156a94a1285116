"""The dispatcher in front of live backends: who goes where, and again when that fails."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from penstock.core.dispatcher import Dispatcher
from penstock.core.policies.dispatch import InstanceView, PlacePolicy
from penstock.core.types import FinishReason, Request
from penstock.router.backend import Backend
from penstock.router.circuit import State
from penstock.router.failures import BackendError, Kind, answer_to, busy, nobody
from penstock.router.metrics import Metrics
from penstock.router.settings import Settings
from penstock.server.errors import ApiError, unavailable

_UNKNOWN_MEMORY = 1 << 20  # KV tokens of a backend that does not say; no placement here reads it


@dataclass(frozen=True, slots=True)
class Rested:
    """A placement among the instances that may get something now; there is at least one.

    Attributes:
        place: chooses among them.
        available: whether the instance of a number may.
    """

    place: PlacePolicy
    available: Callable[[int], bool]

    @property
    def needs_progress(self) -> bool:
        """As the placement inside."""
        return self.place.needs_progress

    @property
    def needs_cost(self) -> bool:
        """As the placement inside."""
        return self.place.needs_cost

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """See :class:`PlacePolicy`."""
        able = [i for i, view in enumerate(instances) if self.available(view.number)]
        return able[self.place.choose([instances[i] for i in able], tokens)]

    def observe(self, length: int) -> None:
        """See :class:`PlacePolicy`."""
        self.place.observe(length)


@dataclass(slots=True, eq=False)
class Stay:
    """A slice at a backend.

    Attributes:
        slice: ``generated`` is where it begins, ``cap`` where it should end.
        generated: output tokens of its request by now.
        began: when.
        task: the attempt, once it runs.
    """

    ticket: Ticket
    backend: Backend
    slice: Request
    generated: int
    began: float
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place with the dispatcher, from its arrival to its end.

    Attributes:
        waits_since: when it came, or its last good slice ended; later by the time that it was at
            backends which then failed.
        begun: it has output.
        failures: in a row.
        refusals: by busy backends, in a row.
        final: it cannot be tried again.
        stay: where it is; None while it waits.
        placed: set when there is a stay.
        last: why its last slice failed.
        ended: why it will not get another one.
    """

    request: Request
    waits_since: float
    begun: bool = False
    failures: int = 0
    refusals: int = 0
    final: bool = False
    stay: Stay | None = None
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    last: BackendError | None = None
    ended: ApiError | None = None


Attempt = Callable[[Stay], Awaitable[None]]


class Pool:
    """Backends behind one dispatcher, with circuits.

    Args:
        clock: seconds, never falling; the circuits' own.
    """

    def __init__(
        self,
        settings: Settings,
        backends: Sequence[Backend],
        metrics: Metrics,
        clock: Callable[[], float],
        model: str,
    ) -> None:
        self._settings = settings
        self.backends = {backend.number: backend for backend in backends}
        self.metrics = metrics
        self._clock = clock
        self._model = model
        policy = settings.policy(settings.placement())
        policy = replace(policy, place=Rested(policy.place, self._available))
        self._dispatcher = Dispatcher(policy, settings.cost if policy.needs_cost else None)
        self._tickets: dict[str, Ticket] = {}
        self._healers: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._log: Any = structlog.get_logger("penstock.router")
        for backend in backends:
            self._join(backend)

    def check(self) -> None:
        """Raise AssertionError if the books contradict themselves (in tests)."""
        self._dispatcher.check()
        assert self._dispatcher.open_requests == len(self._tickets)

    @property
    def open_backends(self) -> int:
        """How many may get requests, now or after a rest."""
        return len(self._dispatcher.instances)

    def exposition(self) -> bytes:
        """Metrics in Prometheus's text format."""
        outstanding = {view.number: view.requests for view in self._dispatcher.instances}
        pooled = self._dispatcher.pooled
        return self.metrics.exposition(self.backends.values(), outstanding, pooled)

    @contextlib.contextmanager
    def enter(self, request: Request) -> Iterator[Ticket]:
        """Take a request in; it waits in the pool, and is withdrawn on leaving.

        Raises:
            ApiError: 503, every circuit is open.
        """
        if not self._dispatcher.instances:
            raise self._nobody()
        ticket = Ticket(request, self._clock())
        self._tickets[request.id] = ticket
        self._dispatcher.add(request, self._clock())
        try:
            yield ticket
        finally:
            self._dispatcher.withdraw(request.id)
            del self._tickets[request.id]

    async def stay(self, ticket: Ticket, attempt: Attempt) -> None:
        """Have a waiting request's next slice made, by as many backends as it takes.

        Args:
            attempt: makes it; called again, with another stay, if a backend fails.

        Raises:
            ApiError: nobody could; or the backend says that the request is wrong.
        """
        while True:
            stay = await self._turn(ticket)
            stay.task = asyncio.ensure_future(attempt(stay))
            try:
                await asyncio.wait({stay.task})
            except asyncio.CancelledError:
                stay.task.cancel()
                await asyncio.gather(stay.task, return_exceptions=True)
                raise
            if stay.task.cancelled():
                if ticket.ended is not None:
                    raise ticket.ended
                if ticket.final:
                    error = BackendError(Kind.CUT, stay.backend.url, stay.backend.complaint)
                    raise answer_to(error, ticket.failures + 1)
                ticket.waits_since += self._clock() - stay.began
                continue  # the circuit opened: it is in the pool again
            outcome = stay.task.exception()
            if not isinstance(outcome, BackendError):
                if outcome is not None:
                    raise outcome
                self.metrics.on_slice(stay.backend, None)
                stay.backend.circuit.success()
                ticket.failures, ticket.refusals, ticket.last = 0, 0, None
                ticket.waits_since = self._clock()
                return
            self._on_failure(ticket, stay, outcome)

    def progress(self, stay: Stay, generated: int) -> None:
        """A slice has come so far, in output tokens of its request."""
        # The cap itself is reached by an end only; a slice that begins there has no room.
        stay.generated = min(generated, stay.slice.cap - 1)
        stay.ticket.begun |= stay.generated > 0
        self._dispatcher.progress(stay.slice.id, stay.generated)

    def back(self, ticket: Ticket, generated: int) -> None:
        """A slice is over and its request goes on: it waits again, with so many tokens."""
        stay, ticket.stay = ticket.stay, None
        if stay is not None and self._dispatcher.whole(stay.slice.id) is not None:
            self._dispatcher.ended(stay.slice.id, generated, FinishReason.LENGTH, self._clock())

    def end_all(self) -> None:
        """End every open request: the router is shutting down."""
        for ticket in self._tickets.values():
            ticket.ended = unavailable("the router is shutting down", "shutting_down")
            ticket.placed.set()
            if ticket.stay is not None and ticket.stay.task is not None:
                ticket.stay.task.cancel()

    async def close(self) -> None:
        """Stop probing."""
        if self._alarm is not None:
            self._alarm.cancel()
        for healer in self._healers:
            healer.cancel()
        await asyncio.gather(*self._healers, return_exceptions=True)

    def _available(self, number: int) -> bool:
        return self.backends[number].circuit.available

    def _join(self, backend: Backend) -> None:
        self._dispatcher.join(backend.number, backend.max_tokens or _UNKNOWN_MEMORY)

    async def _turn(self, ticket: Ticket) -> Stay:
        left = ticket.waits_since + self._settings.max_wait - self._clock()
        if left <= 0 and ticket.refusals >= len(self.backends):
            raise self._nobody()  # while backends take turns at being busy, it never has to wait
        try:
            async with asyncio.timeout(max(0.0, left)):
                self._pump()
                if ticket.stay is None and not ticket.begun:
                    self._refuse_if_busy()
                while ticket.stay is None and ticket.ended is None:
                    ticket.placed.clear()
                    await ticket.placed.wait()
        except TimeoutError:
            if ticket.last is not None and ticket.last.kind is not Kind.BUSY:
                raise answer_to(ticket.last, ticket.failures) from None
            raise self._nobody() from None
        if ticket.ended is not None:
            raise ticket.ended
        assert ticket.stay is not None
        return ticket.stay

    def _pump(self) -> None:
        """Send whoever waits, if somebody can take them; else do it when somebody can."""
        if not self._dispatcher.pooled:
            return
        circuits = [self.backends[view.number].circuit for view in self._dispatcher.instances]
        if any(circuit.available for circuit in circuits):
            for batch in self._dispatcher.dispatch(self._clock()):
                for part in batch.requests:
                    self._assign(self.backends[batch.instance], part)
        elif circuits:
            if self._alarm is not None:
                self._alarm.cancel()
            wait = min(circuit.free_at for circuit in circuits) - self._clock()
            self._alarm = asyncio.get_running_loop().call_later(max(0.0, wait), self._pump)

    def _assign(self, backend: Backend, part: Request) -> None:
        name = self._dispatcher.whole(part.id)
        assert name is not None
        ticket = self._tickets[name]
        ticket.stay = Stay(ticket, backend, part, part.generated, self._clock())
        ticket.placed.set()

    def _on_failure(self, ticket: Ticket, stay: Stay, error: BackendError) -> None:
        backend = stay.backend
        self.metrics.on_slice(backend, error.kind)
        if error.kind is Kind.BUSY:
            ticket.refusals += 1
        else:
            ticket.failures += 1
            ticket.waits_since += self._clock() - stay.began
        ticket.last = error
        backend.complaint = str(error)
        self._log.warning(
            "slice_failed",
            request_id=ticket.request.id,
            backend=backend.url,
            kind=error.kind.value,
            error=str(error),
            attempt=ticket.failures,
        )
        self._blame(backend, error)
        if ticket.final or ticket.failures > self._settings.retries:
            raise answer_to(error, ticket.failures)
        self.metrics.on_retry(error.kind)
        if ticket.stay is stay:
            self.back(ticket, stay.generated)

    def _blame(self, backend: Backend, error: BackendError) -> None:
        if error.kind is Kind.BUSY:
            backend.circuit.busy(1.0 if error.retry_after is None else error.retry_after)
            return
        if backend.circuit.failure():
            self._open(backend)
        elif error.retry_after is not None:
            backend.circuit.busy(error.retry_after)

    def _open(self, backend: Backend) -> None:
        """Leave a backend alone; what it had goes elsewhere with the tokens that have come."""
        self.metrics.on_open(backend)
        self._log.error("circuit_opened", backend=backend.url, error=backend.complaint)
        for name in self._dispatcher.lose(backend.number, self._clock()):
            ticket = self._tickets[name]
            stay, ticket.stay = ticket.stay, None
            if stay is not None and stay.task is not None:
                stay.task.cancel()
        healer = asyncio.ensure_future(self._heal(backend))
        self._healers.add(healer)
        healer.add_done_callback(self._healers.discard)
        self._pump()

    async def _heal(self, backend: Backend) -> None:
        """Probe a backend until it works again."""
        circuit = backend.circuit
        while circuit.state is not State.CLOSED:
            await asyncio.sleep(max(0.0, circuit.due - self._clock()))
            circuit.probe()
            try:
                await self._probe(backend)
            except BackendError as error:
                self._on_failed_probe(backend, str(error))
            except Exception as error:  # noqa: BLE001 - else it would never be probed again
                words = f"{backend.url}: the probe ended with {type(error).__name__}"
                self._on_failed_probe(backend, words, exc_info=True)
            else:
                circuit.probed(ok=True)
        self._log.info("circuit_closed", backend=backend.url)
        self._join(backend)
        self._pump()

    def _on_failed_probe(self, backend: Backend, words: str, **more: Any) -> None:
        backend.complaint = words
        backend.circuit.probed(ok=False)
        self._log.warning("probe_failed", backend=backend.url, error=words, **more)

    async def _probe(self, backend: Backend) -> None:
        served = [model["id"] for model in await backend.models()]
        if self._model not in served:
            msg = f"it serves {', '.join(served)} now, not {self._model}"
            raise BackendError(Kind.ERROR, backend.url, msg)
        await backend.probe(self._model)

    def _refuse_if_busy(self) -> None:
        """Say so at once if every backend has asked to be left alone: who waits adds nothing.

        Raises:
            ApiError: 429, with the time after which the first of them may be asked again.
        """
        instances = self._dispatcher.instances
        waits = [
            self.backends[view.number].circuit.busy_until - self._clock() for view in instances
        ]
        if waits and min(waits) > 0:
            raise busy([self.backends[view.number].complaint for view in instances], min(waits))

    def _nobody(self) -> ApiError:
        now = self._clock()
        reasons, waits = [], []
        for backend in self.backends.values():
            circuit = backend.circuit
            due = circuit.free_at if circuit.state is State.CLOSED else circuit.due
            waits.append(max(0.0, due - now))
            reasons.append(backend.complaint or f"{backend.url}: busy")
        return nobody(reasons, min(waits, default=math.inf))
