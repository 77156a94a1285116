"""A request and its answer on their way through vLLM's HTTP server."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from penstock.server.errors import ApiError
from penstock.vllm.asked import asked, checked
from penstock.vllm.intake import ANSWER, CHOICES, CLIENTS_ID
from penstock.vllm.settings import PluginConfig
from penstock.vllm.verdict import Verdict

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

CURRENT: ContextVar[Exchange | None] = ContextVar("penstock_exchange", default=None)
"""The exchange that the running task serves."""


class Exchange:
    """Knows what the client was promised, and what the scheduler made of it.

    Until the first token is there, a stream is held back: so a verdict can still be a status.
    Only a comment lets it go before: whoever keeps a connection alive with them wants that more.

    Args:
        scope, receive, send: of the connection.
        settings: the plug-in's.

    Attributes:
        error: what to answer instead of what the application says; None: nothing is wrong.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: PluginConfig) -> None:
        self._headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._settings = settings
        self._name = uuid4().hex
        json = self._headers.get("content-type", "").lower().startswith("application/json")
        self._body: list[bytes] | None = [] if json else None
        self.error: ApiError | None = None
        self._start: Message | None = None
        self._held: list[Message] = []
        self._spoke = self._begun = self._over = False

    async def receive(self) -> Message:
        """The client's next message."""
        message = await self._receive()
        if self._body is not None and message["type"] == "http.request":
            self._body.append(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Take the application's next message."""
        if self._over:
            return
        self._held.append(message)
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self.error is not None:
            await self._break_off(self.error)
            return
        self._over = not message.get("more_body", False)
        comment = message.get("body", b"").startswith(b":")
        if self._begun or self._spoke or self._over or comment or not self._streams:
            held, self._held = self._held, []
            self._begun = True
            for one in held:
                await self._send(one)

    async def settle(self) -> bool:
        """The application broke off: answer for it; False if nothing is known to be wrong."""
        if self.error is None or self._over:
            return False
        await self._break_off(self.error)
        return True

    def arguments(self, given: Mapping[str, object] | None, choices: int) -> dict[str, object]:
        """What the scheduler is to know: a request's own ``extra_args``, the promise, names.

        Args:
            given: the former.
            choices: that each prompt has.

        Raises:
            ValueError: the promise cannot be right; that is the answer from now on.
        """
        try:
            more = checked(self._asked, given or {})
        except ApiError as error:
            self.error = error
            raise ValueError(error.message) from None
        names: dict[str, object] = {ANSWER: self._name, CHOICES: choices}
        if (own := self._headers.get("x-request-id")) is not None:
            names[CLIENTS_ID] = own
        return {**(given or {}), **more, **names}

    async def heard(
        self, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, after a look at how they end.

        Raises:
            CancelledError: a verdict came when the answer had been sent, as for work in background:
                vLLM's routes take it for a failure, and other exceptions for none.
        """
        async with aclosing(outputs):
            async for output in outputs:
                for one in output.outputs:
                    self._spoke = self._spoke or bool(one.token_ids)
                    verdict = Verdict.decode(one.stop_reason)
                    if one.finish_reason == "abort" and verdict is not None:
                        self.error = self.error or verdict.error()
                if self._over and self.error is not None:
                    raise CancelledError(self.error.message)
                yield output

    @property
    def _streams(self) -> bool:
        return self._start is not None and Headers(raw=self._start["headers"]).get(
            "content-type", ""
        ).startswith("text/event-stream")

    @cached_property
    def _asked(self) -> dict[str, object]:
        body, self._body = b"".join(self._body or ()), None
        traced = self._settings.bench.trace_lengths
        return asked(self._headers, body, self._settings.slo, traced=traced)

    async def _break_off(self, error: ApiError) -> None:
        """End with an error: as a status, if nothing has been said."""
        self._over = True
        # Anthropic's clients look for the type; OpenAI's do not mind it.
        body = b'{"type":"error",' + error.body().removeprefix(b"{")
        if self._begun:
            event = b"event: error\ndata: " + body + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
            return
        # What other middlewares have written, such as CORS headers, holds for errors, too.
        headers = MutableHeaders(raw=list((self._start or {}).get("headers", ())))
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        headers.update(error.headers)
        start = {"type": "http.response.start", "status": error.status, "headers": headers.raw}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def watch(client: Any) -> None:
    """Let ``client.generate`` tell the current exchange what it says.

    Every route of vLLM's that generates calls it, and what it says is all that they know.

    Args:
        client: vLLM's, to its engine.
    """
    generate = client.generate

    def watched(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        exchange = CURRENT.get()
        if exchange is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        # Routes may use one object for several requests.
        params = copy(sampling_params)
        params.extra_args = exchange.arguments(params.extra_args, params.n)
        return exchange.heard(generate(prompt, params, *args, **kwargs))

    client.generate = watched
