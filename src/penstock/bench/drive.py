"""Drive an endpoint in closed loop (N clients, one request each at a time) or open loop (arrivals).

Closed loop follows the Past-Future artifact: all clients pull from one queue,
and an attempt that fails (error, refusal or broken SLO) puts its request back
at the end of the queue, so wasted work costs time.  Retries are bounded here.
Open loop never retries: that would change the arrival process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, TypeAlias

import aiohttp

from penstock.bench import client
from penstock.bench.client import Answer, Target
from penstock.bench.goodput import Attempt, End, Latency, Timeline, latency_of, misses
from penstock.bench.prompts import Prompts
from penstock.bench.workload import Workload

LengthMode: TypeAlias = Literal["hidden", "leaked", "model"]
"""Who knows the true output length: only the engine (a hook), everyone, or nobody."""

_PAUSE = 0.1  # seconds before a client goes on after an error or a refusal without Retry-After


@dataclass(frozen=True, slots=True)
class Rules:
    """How requests are sent.

    Attributes:
        cap: ``max_tokens`` of every request, the same for all.
        lengths: ``hidden`` sends the true length in ``trace_output_tokens``, which only the
            engine reads; ``leaked`` sends it as ``max_tokens`` with ``ignore_eos``; ``model``
            sends neither.
        retries: how often a failed request goes back into the queue (closed loop).
        send_slo: tell the server each request's SLO (body field ``slo``).
        patience: share of the TTFT bound after which a client without a token hangs up; None
            waits for ever.  Leaving a little before the bound matters: with first-come-first-served
            and everybody waiting until the bound, those who are served are just too late.
        text_prompts: send words instead of token ids.
        banned: token ids that must not come out.  An end-of-sequence token that the hook overrules
            has no text, so a client cannot see when it came.
    """

    cap: int
    lengths: LengthMode = "hidden"
    retries: int = 10
    send_slo: bool = False
    patience: float | None = None
    text_prompts: bool = False
    banned: tuple[int, ...] = ()


class HookError(RuntimeError):
    """The endpoint does not end requests at the wanted length: the run would be worthless."""


@dataclass(slots=True)
class _Try:
    """A request's turn in the queue."""

    request: int
    number: int = 0
    turn: int = 0


@dataclass(slots=True)
class Run:
    """One measurement: what to send, how, and what came of it.

    Attributes:
        attempts: all attempts so far, in the order in which they ended.
        lags: open loop: seconds by which each request left later than planned.
        gave_up: requests whose retries were used up.
        on_attempt: called after each attempt, for progress.
        start: when the first request left (``time.perf_counter``).
    """

    target: Target
    workload: Workload
    prompts: Prompts
    rules: Rules
    on_attempt: Callable[[Attempt], None] = lambda _: None
    attempts: list[Attempt] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    gave_up: int = 0
    start: float = 0.0

    def body(self, request: int, turn: int = 0) -> bytes:
        """The JSON body of a request."""
        length = self.workload.output_of(request)
        extra: dict[str, object] = {}
        most = self.rules.cap
        if self.rules.lengths == "hidden":
            extra["trace_output_tokens"] = length
        elif self.rules.lengths == "leaked":
            most = length or most
            extra["ignore_eos"] = True
        if self.rules.banned:
            extra["logit_bias"] = {str(token): -100 for token in self.rules.banned}
        slo = self.workload.slo_class(request).slo
        if self.rules.send_slo:
            bounds = {"ttft": slo.ttft, "tpot": slo.tpot, "gap": slo.gap, "e2e": slo.e2e}
            extra["slo"] = {f"{k}_ms": v * 1000 for k, v in bounds.items() if v is not None}
        text = self.rules.text_prompts or self.target.api == "chat"
        prompt = (self.prompts.text if text else self.prompts.ids)(request, turn)
        return client.body_of(self.target, prompt, most, extra)

    async def closed_loop(
        self, clients: int, duration: float | None = None, completed: int | None = None
    ) -> None:
        """Send the workload with ``clients`` clients.

        Without ``duration`` until every request has met its SLO or used up its retries.  With
        it, for so many seconds, starting the workload over when it runs out; what still runs
        then is cut.

        Args:
            completed: stop before that, once so many attempts have run to their end.
        """
        queue: asyncio.Queue[_Try] = asyncio.Queue()
        turn = 0
        ended, enough = 0, asyncio.Event()

        def fill() -> None:
            nonlocal turn
            for request in range(len(self.workload)):
                queue.put_nowait(_Try(request, turn=turn))
            turn += 1

        async def work(session: aiohttp.ClientSession) -> None:
            nonlocal ended
            while True:
                if duration is not None and queue.empty():
                    fill()
                one = await queue.get()
                attempt, pause = await self.attempt(session, one)
                ended += attempt.end is End.COMPLETED
                if ended == completed:
                    enough.set()
                if not attempt.met:
                    self._put_back(queue, one)
                queue.task_done()
                await asyncio.sleep(pause)

        fill()
        async with self.target.session() as session:
            self.start = perf_counter()
            async with _tasks(work(session) for _ in range(clients)) as group:
                # With a duration the queue may be done for a moment, until a client fills it again.
                endless = duration is not None or completed is not None
                await _first_of(enough.wait() if endless else queue.join(), group, duration)

    async def open_loop(self, speed: float = 1.0, duration: float | None = None) -> None:
        """Send each request at its arrival time divided by ``speed``.

        Raises:
            ValueError: the workload has no times.
        """
        times = self.workload.arrival
        if times is None:
            msg = f"{self.workload.source} has no arrival times; give a rate"
            raise ValueError(msg)

        async def one(session: aiohttp.ClientSession, request: int) -> None:
            due = self.start + float(times[request]) / speed
            await asyncio.sleep(max(0.0, due - perf_counter()))
            self.lags.append(perf_counter() - due)
            await self.attempt(session, _Try(request))

        async with self.target.session() as session:
            self.start = perf_counter()
            rows = range(len(self.workload))
            async with _tasks(one(session, i) for i in rows) as group:
                await _first_of(asyncio.gather(*group), [], duration)

    def _put_back(self, queue: asyncio.Queue[_Try], one: _Try) -> None:
        if one.number < self.rules.retries:
            queue.put_nowait(_Try(one.request, one.number + 1, one.turn))
        else:
            self.gave_up += 1

    async def attempt(self, session: aiohttp.ClientSession, one: _Try) -> tuple[Attempt, float]:
        """Send one request and write down how it went; also how long its client should pause."""
        answer = Answer(perf_counter())
        end, detail, pause = End.CUT, "", 0.0
        try:
            body = self.body(one.request, one.turn)
            end, detail, pause = await self._send(session, one.request, body, answer)
        finally:  # a cut attempt is written down as well
            attempt = self._attempt(one, answer, end, detail)
            self.attempts.append(attempt)
            self.on_attempt(attempt)
        return attempt, pause

    async def _send(
        self, session: aiohttp.ClientSession, request: int, body: bytes, answer: Answer
    ) -> tuple[End, str, float]:
        ttft = self.workload.slo_class(request).slo.ttft
        patience = self.rules.patience
        bound = None if patience is None or ttft is None else patience * ttft
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:

                def leave() -> None:
                    if not answer.arrivals:
                        limit.reschedule(loop.time())

                timer = None if bound is None else loop.call_later(bound, leave)
                try:
                    await client.complete(session, self.target, body, answer)
                finally:
                    if timer is not None:
                        timer.cancel()
        except client.RefusedError as error:
            return End.REFUSED, str(error), error.retry_after or _PAUSE
        except client.ExpiredError as error:
            return End.EXPIRED, str(error), 0.0
        except TimeoutError:
            if limit.expired():
                return End.ABANDONED, "", 0.0
            return End.ERROR, f"no end within {self.target.timeout:g} s", _PAUSE
        except (client.ServerError, aiohttp.ClientError) as error:
            return End.ERROR, f"{type(error).__name__}: {error}", _PAUSE
        return End.COMPLETED, "", 0.0

    def _attempt(self, one: _Try, answer: Answer, end: End, detail: str) -> Attempt:
        wanted = self.workload.output_of(one.request)
        if end is End.COMPLETED and wanted is not None and answer.output_tokens != wanted:
            end = End.ERROR
            detail = f"{answer.output_tokens} output tokens came instead of the trace's length"
        latency = (
            latency_of(Timeline(answer.sent, answer.arrivals, answer.output_tokens))
            if answer.arrivals
            else Latency(None, None, None, None)
        )
        chosen = self.workload.slo_class(one.request)
        return Attempt(
            request=one.request + one.turn * len(self.workload),
            number=one.number,
            slo_class=chosen.name,
            prompt_tokens=int(self.workload.prompt[one.request]),
            output_tokens=answer.output_tokens,
            sent=answer.sent,
            ended=perf_counter(),
            end=end,
            latency=latency,
            broken=misses(latency, chosen.slo) if end is End.COMPLETED else (),
            detail=detail,
        )


async def check(target: Target, rules: Rules, prompt: list[int] | str) -> None:
    """Send one short request and see that it ends as the rules want it to.

    Raises:
        HookError: it does not; the message says what to do.
    """
    wanted = 3
    extra: dict[str, object] = {}
    if rules.lengths == "hidden":
        extra["trace_output_tokens"] = wanted
    elif rules.lengths == "leaked":
        extra["ignore_eos"] = True
    most = min(wanted, rules.cap) if rules.lengths == "leaked" else max(rules.cap, wanted)
    answer = Answer(0.0)
    how = (
        "start the server with --trace-lengths, let the model decide with --output model, or say "
        "--engine-has-no-hook (results are then labelled: lengths leaked)"
    )
    try:
        async with target.session() as session:
            body = client.body_of(target, prompt, most, extra)
            await client.complete(session, target, body, answer)
    except (client.RefusedError, client.ExpiredError, client.ServerError) as error:
        hint = f"; {how}" if "trace_output_tokens" in str(error) else ""
        msg = f"{target.route} refused a trial request: {error}{hint}"
        raise HookError(msg) from None
    except (aiohttp.ClientError, TimeoutError) as error:
        msg = f"{target.route} does not answer: {type(error).__name__}: {error}"
        raise HookError(msg) from None
    if rules.lengths != "model" and answer.output_tokens != wanted:
        msg = (
            f"{target.route} gave {answer.output_tokens} output tokens where {wanted} were asked "
            f"for, so it does not keep to the workload's lengths; {how}"
        )
        raise HookError(msg)


@asynccontextmanager
async def _tasks(
    coroutines: Iterable[Coroutine[None, None, None]],
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run coroutines as tasks; cancel and await whatever is left on the way out."""
    group = [asyncio.create_task(c) for c in coroutines]
    try:
        yield group
    finally:
        for task in group:
            task.cancel()
        await asyncio.gather(*group, return_exceptions=True)


async def _first_of(
    done: Awaitable[object], group: list[asyncio.Task[None]], duration: float | None
) -> None:
    """Wait for ``done``, for an unexpected failure in ``group``, or for the time to be up."""
    finished = asyncio.ensure_future(done)
    try:
        tasks: list[asyncio.Future[Any]] = [finished, *group]
        ended, _ = await asyncio.wait(tasks, timeout=duration, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        finished.cancel()
