"""Writing one response: made of slices, or passed through as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.core.types import Request
from penstock.router.answer import Answer
from penstock.router.failures import BackendError, Kind
from penstock.router.pool import Pool, Stay, Ticket
from penstock.router.slices import run
from penstock.server.errors import ApiError

_DONE = b"data: [DONE]\n\n"
_LEFT = 499
_NO_CACHE = {"cache-control": "no-cache"}
OnEnd = Callable[[int, int], None]
"""Told the status that was sent, 499 if the client left first, and the output tokens."""


class _Reply:
    """An ASGI response that ends when its client leaves."""

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._status = _LEFT
        self._sent = False  # all of it: after that a server calls every client gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve."""
        del scope
        work = asyncio.ensure_future(self._work(send))
        watcher = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or self._sent:
                await work
            else:
                self._status = _LEFT
        finally:
            for task in (work, watcher):
                task.cancel()
            await asyncio.gather(work, watcher, return_exceptions=True)
            self._on_end(self._status, self._output_tokens())

    async def _work(self, send: Send) -> None:
        del send

    def _output_tokens(self) -> int:
        return 0

    async def _start(
        self, send: Send, status: int, content_type: str, headers: Mapping[str, str]
    ) -> None:
        self._status = status
        every = {"content-type": content_type, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def _whole(
        self, send: Send, status: int, content_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        size = {"content-length": str(len(body))}
        await self._start(send, status, content_type, {**headers, **size})
        await self._last(send, body)

    async def _last(self, send: Send, body: bytes) -> None:
        self._sent = True
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _refuse(self, send: Send, error: ApiError) -> None:
        await self._whole(send, error.status, "application/json", error.body(), error.headers)


class SlicedReply(_Reply):
    """A completion made of slices.

    No status is sent before the first text or the end, so whoever waits in vain gets a proper
    error status even if it asked for a stream.

    Args:
        headers: of the client, for the backends.
    """

    def __init__(
        self,
        pool: Pool,
        request: Request,
        answer: Answer,
        headers: Mapping[str, str],
        on_end: OnEnd,
    ) -> None:
        super().__init__(on_end)
        self._pool = pool
        self._request = request
        self._answer = answer
        self._headers = headers
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": answer.body.fields["model"],
        }

    def _output_tokens(self) -> int:
        return self._answer.generated

    async def _work(self, send: Send) -> None:
        runner = asyncio.ensure_future(self._run())
        try:
            await (self._stream(send) if self._answer.body.stream else self._send_whole(send))
        finally:
            if self._answer.finish is None:
                runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await runner

    async def _run(self) -> None:
        try:
            with self._pool.enter(self._request) as ticket:
                await run(self._pool, ticket, self._answer, self._headers)
        except ApiError as error:
            self._answer.give_up(error)
        except Exception:
            # Nobody awaits this task before its end: the client must not wait for ever.
            msg = "an internal error; the router's log has the details"
            self._answer.give_up(ApiError(500, msg, code="internal_error", kind="server_error"))
            raise

    async def _send_whole(self, send: Send) -> None:
        answer = self._answer
        while answer.finish is None and answer.error is None:
            await answer.mailbox.wait()
        if answer.error is not None:
            await self._refuse(send, answer.error)
            return
        body = {
            **self._head,
            "choices": [self._choice(answer.read(), answer.finish)],
            "usage": answer.usage,
        }
        await self._whole(send, 200, "application/json", msgspec.json.encode(body), {})

    async def _stream(self, send: Send) -> None:
        answer, started = self._answer, False
        while True:
            await answer.mailbox.wait()
            if not started:
                if answer.error is not None and not answer.pending:
                    await self._refuse(send, answer.error)
                    return
                await self._start(send, 200, "text/event-stream", _NO_CACHE)
                started = True
            ended = answer.finish is not None or answer.error is not None
            events = self._events()
            if ended:
                await self._last(send, events)
                return
            await send({"type": "http.response.body", "body": events, "more_body": True})

    def _events(self) -> bytes:
        answer = self._answer
        text, parts = answer.read(), []
        if text:
            parts.append(self._chunk([self._choice(text, None)]))
        if answer.error is not None:
            parts.append(answer.error.event())
        elif answer.finish is not None:
            parts.append(self._chunk([self._choice("", answer.finish)]))
            if answer.body.include_usage:
                parts.append(self._chunk([], answer.usage))
            parts.append(_DONE)
        return b"".join(parts)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = {**self._head, "choices": choices}
        if self._answer.body.include_usage:
            body["usage"] = usage
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _choice(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


class ForwardedReply(_Reply):
    """A request passed on whole, and its answer as it comes.

    While nothing has been sent to the client, another backend is tried after a failure.

    Args:
        path: the route, at the backend too.
        stream: whether the answer is one.
    """

    def __init__(
        self,
        pool: Pool,
        request: Request,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        on_end: OnEnd,
        *,
        stream: bool,
    ) -> None:
        super().__init__(on_end)
        self._pool = pool
        self._request = request
        self._path = path
        self._body = body
        self._headers = headers
        self._streams = stream
        self._started = False
        self._answer = b""

    async def _work(self, send: Send) -> None:
        try:
            with self._pool.enter(self._request) as ticket:
                await self._pool.stay(ticket, lambda stay: self._attempt(stay, ticket, send))
        except ApiError as error:
            if self._started:
                await self._last(send, error.event())
            else:
                await self._refuse(send, error)
            return
        if self._streams:
            await self._last(send, b"")
        else:
            await self._whole(send, 200, "application/json", self._answer, {})

    async def _attempt(self, stay: Stay, ticket: Ticket, send: Send) -> None:
        ask = self._path, self._body, self._headers
        if not self._streams:
            self._answer = await stay.backend.whole(*ask)
            return
        async with stay.backend.post(*ask) as response:
            async for piece in response.content.iter_any():
                if not self._started:
                    self._started = ticket.final = True
                    await self._start(send, 200, "text/event-stream", _NO_CACHE)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not self._started:
            raise BackendError(Kind.CUT, stay.backend.url, "the stream ended without a byte")


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
