"""Writing one response: whole or as a stream, until it is done or the client has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

from starlette.types import Receive, Scope, Send

from penstock.server.choice import Choice, Mailbox
from penstock.server.client import EngineClient
from penstock.server.errors import ApiError
from penstock.server.shapes import DONE, Shape

RAW_SEND = "penstock.send"
"""Where in the scope the server's own ``send`` is found."""


class Reply:
    """An ASGI response over some choices.

    No status is sent before the first text or the end: a request that is
    refused, expires or fails while it waits gets a proper error status even if
    it asked for a stream.  After that errors are events of the stream, which
    then ends without ``[DONE]``.

    Args:
        on_end: called once with the status sent (499 if the client left first).
    """

    def __init__(
        self,
        client: EngineClient,
        choices: Sequence[Choice],
        mailbox: Mailbox,
        shape: Shape,
        headers: Mapping[str, str],
        on_end: Callable[[Reply, int], None],
        *,
        stream: bool,
        include_usage: bool,
    ) -> None:
        self.choices = choices
        self._client = client
        self._mailbox = mailbox
        self._shape = shape
        self._headers = dict(headers)
        self._on_end = on_end
        self._stream = stream
        self._include_usage = include_usage
        self._gone = False
        self._status = 499

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; whatever happens, no choice is left open behind."""
        send = scope.get(RAW_SEND, send)
        watcher = asyncio.ensure_future(self._watch(receive))
        try:
            await (self._send_stream(send) if self._stream else self._send_whole(send))
        finally:
            watcher.cancel()
            self.cancel()
            self._on_end(self, self._status)

    @property
    def request_id(self) -> str:
        """The client's own name for it, or the one that it was given."""
        return self._headers["x-request-id"]

    def cancel(self) -> None:
        """End every choice that has not ended."""
        for choice in self.choices:
            self._client.cancel(choice)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; a prompt with several choices counts once."""
        prompts = {choice.prompt_index: choice.prompt_tokens for choice in self.choices}
        prompt, output = sum(prompts.values()), sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self.cancel()

    def _error(self) -> ApiError | None:
        return next((choice.error for choice in self.choices if choice.error is not None), None)

    async def _send_whole(self, send: Send) -> None:
        error = None
        while error is None and not all(choice.ended for choice in self.choices):
            await self._mailbox.wait()
            error = self._error()
        if self._gone:
            return
        if error is not None:
            await self._refuse(send, error)
            return
        body = self._shape.whole(self.choices, self.usage)
        await self._start(send, 200, "application/json", {"content-length": str(len(body))})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_stream(self, send: Send) -> None:
        started = False
        closed: set[int] = set()
        while True:
            await self._mailbox.wait()
            if self._gone:
                return
            error = self._error()
            if not started:
                if error is not None:
                    await self._refuse(send, error)
                    return
                await self._start(send, 200, "text/event-stream", {"cache-control": "no-cache"})
                started = True
            body = self._news(closed)
            done = error is not None or len(closed) == len(self.choices)
            if error is not None:
                body += error.event()
            elif done:
                body += self._shape.usage_chunk(self.usage) if self._include_usage else b""
                body += DONE
            await send({"type": "http.response.body", "body": body, "more_body": not done})
            if done:
                return

    def _news(self, closed: set[int]) -> bytes:
        parts = []
        for choice in self.choices:
            # Tokens without text that is told have log probabilities too.
            if choice.pending or (choice.logprobs and choice.finish_reason is not None):
                text, logprobs = choice.take()
                parts.append(self._shape.chunk(choice, text, logprobs))
            if choice.finish_reason is not None and choice.index not in closed:
                closed.add(choice.index)
                parts.append(self._shape.last_chunk(choice))
        return b"".join(parts)

    async def _refuse(self, send: Send, error: ApiError) -> None:
        body = error.body()
        extra = {**error.headers, "content-length": str(len(body))}
        await self._start(send, error.status, "application/json", extra)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(
        self, send: Send, status: int, content_type: str, extra: Mapping[str, str]
    ) -> None:
        self._status = status
        headers = {"content-type": content_type, **self._headers, **extra}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        with contextlib.suppress(OSError):  # the client has left; the watcher will say so
            await send({"type": "http.response.start", "status": status, "headers": raw})
