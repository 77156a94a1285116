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

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from penstock.server.answers import error_response
from penstock.server.errors import ApiError
from penstock.settings import SLOClass
from penstock.vllm.asked import asked, checked
from penstock.vllm.intake import ANSWER
from penstock.vllm.verdict import Verdict

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

CURRENT: ContextVar[Exchange | None] = ContextVar("penstock_exchange", default=None)
"""The exchange that the running task serves."""


class Exchange:
    """Knows what the client was promised, and what the scheduler made of it.

    Until the first token is there, a stream is held back: so a verdict can still be a status.

    Args:
        scope, receive, send: of the connection.
        classes: that a request may name.

    Attributes:
        error: what to answer instead of what the application says; None: nothing is wrong.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, classes: Mapping[str, SLOClass]
    ) -> None:
        self._headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._classes = classes
        self._name = uuid4().hex
        json = self._headers.get("content-type", "").startswith("application/json")
        self._body: list[bytes] | None = [] if json else None
        self.error: ApiError | None = None
        self._spoke = self._streams = self._begun = self._over = False
        self._held: list[Message] = []

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
        if message["type"] == "http.response.start":
            kind = Headers(raw=message.get("headers", ())).get("content-type", "")
            self._streams = kind.startswith("text/event-stream")
        if self.error is not None:
            await self._break_off(self.error)
            return
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        self._held.append(message)
        if self._spoke or last or not self._streams:
            held, self._held = self._held, []
            self._begun = True
            self._over = last
            for one in held:
                await self._send(one)

    def arguments(self, given: Mapping[str, object] | None) -> dict[str, object]:
        """What the scheduler is to know: a request's own ``extra_args``, the promise, a name.

        Raises:
            ValueError: the promise cannot be right; that is the answer from now on.
        """
        try:
            more = checked(self._asked, given or {})
        except ApiError as error:
            self.error = error
            raise ValueError(error.message) from None
        return {**(given or {}), **more, ANSWER: self._name}

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

    async def settle(self) -> bool:
        """The application broke off: answer for it; False if nothing is known to be wrong."""
        if self.error is None or self._over:
            return False
        await self._break_off(self.error)
        return True

    @cached_property
    def _asked(self) -> dict[str, object]:
        return asked(self._headers, b"".join(self._body or ()), self._classes)

    async def _break_off(self, error: ApiError) -> None:
        """End with an error: as a status, if nothing has been said."""
        self._over = True
        if self._begun:
            event = b"event: error\n" + error.event()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await error_response(error)({"type": "http"}, self._receive, self._send)


def watch(client: Any) -> None:
    """Let ``client.generate`` tell the current exchange what it says; once is enough.

    Every route of vLLM's that generates calls it, and what it says is all that they know.

    Args:
        client: vLLM's, to its engine.
    """
    generate = client.generate
    if getattr(generate, "watched", False):
        return

    def watched(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        exchange = CURRENT.get()
        if exchange is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        # Routes may use one object for several requests.
        params = copy(sampling_params)
        params.extra_args = exchange.arguments(params.extra_args)
        return exchange.heard(generate(prompt, params, *args, **kwargs))

    watched.watched = True  # type: ignore[attr-defined]
    client.generate = watched
