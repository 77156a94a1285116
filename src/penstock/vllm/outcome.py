"""An answer on its way out of vLLM: held until it is clear whether it is one."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.types import Message, Receive, Send

from penstock.server.answers import error_response
from penstock.server.errors import ApiError
from penstock.vllm.verdict import Verdict

_EVENT_END = b"\n\n"
_DATA = b"data: "


class Answer:
    """Passes messages on, until one carries a verdict: then the client gets that.

    Args:
        send: to the client.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._held = b""
        self._streams = False
        self._begun = False
        self._over = asyncio.Event()

    async def __call__(self, message: Message) -> None:
        """Take the application's next message."""
        if self._over.is_set():
            return
        if message["type"] == "http.response.start":
            await self._on_start(message)
        elif self._start is None:
            await self._send(message)
        elif self._streams:
            await self._on_events(message)
        else:
            await self._on_body(message)

    async def or_over(self, receive: Receive) -> Message:
        """The client's next message, or its leave: an answer that is over needs no more tokens."""
        waiting = [asyncio.ensure_future(receive()), asyncio.ensure_future(self._over.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._over.is_set():
                return {"type": "http.disconnect"}
            return await waiting[0]  # type: ignore[return-value]
        finally:
            for one in waiting:
                one.cancel()

    async def _on_start(self, message: Message) -> None:
        kind = dict(message.get("headers", ())).get(b"content-type", b"")
        self._streams = kind.startswith(b"text/event-stream")
        if message["status"] == 200 and (self._streams or kind.startswith(b"application/json")):
            self._start = message
        else:
            await self._send(message)

    async def _on_body(self, message: Message) -> None:
        """A whole answer is held until it is whole."""
        self._held += message.get("body", b"")
        if message.get("more_body", False):
            return
        error = _error_of(self._held)
        if error is not None:
            await self.refuse(error)
            return
        assert self._start is not None
        await self._send(self._start)
        await self._send({**message, "body": self._held})

    async def _on_events(self, message: Message) -> None:
        """A stream is held until an event says something."""
        self._held += message.get("body", b"")
        last = not message.get("more_body", False)
        whole, end, rest = self._held.rpartition(_EVENT_END)
        if last:
            whole, end, rest = self._held, b"", b""
        for event in whole.split(_EVENT_END):
            error = _error_of(event.removeprefix(_DATA))
            if error is not None:
                ahead = whole[: whole.index(event)]
                await self._break_off(ahead, error)
                return
        if not last and (not end or not (self._begun or _says_something(whole))):
            return
        self._held = rest
        await self._pass_on(whole + end, more=not last)

    async def _pass_on(self, body: bytes, *, more: bool) -> None:
        if not self._begun:
            self._begun = True
            assert self._start is not None
            await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _break_off(self, ahead: bytes, error: ApiError) -> None:
        """End a stream with an error: as a status, if nothing has been said."""
        if self._begun or _says_something(ahead):
            await self._pass_on(ahead + error.event(), more=False)
            self._over.set()
        else:
            await self.refuse(error)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, whatever the application says from now on."""
        self._over.set()
        await error_response(error)({"type": "http"}, _nothing, self._send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _choices(event: bytes) -> list[dict[str, Any]]:
    """The choices of an answer, or of one event of it."""
    try:
        decoded = msgspec.json.decode(event)
    except msgspec.MsgspecError:
        return []
    choices = decoded.get("choices") if isinstance(decoded, dict) else None
    return [one for one in choices or () if isinstance(one, dict)]


def _error_of(event: bytes) -> ApiError | None:
    """The error that an answer, or one event of it, stands for."""
    if b'"abort"' not in event:
        return None
    for choice in _choices(event):
        verdict = Verdict.decode(choice.get("stop_reason"))
        if choice.get("finish_reason") == "abort" and verdict is not None:
            return verdict.error()
    return None


def _says_something(events: bytes) -> bool:
    """Whether any of these events is more than a role."""
    for event in events.split(_EVENT_END):
        if event and not event.startswith(_DATA):
            return True
        for choice in _choices(event.removeprefix(_DATA)):
            delta = choice.get("delta")
            if delta is None or choice.get("finish_reason") is not None:
                return True
            if any(value for name, value in delta.items() if name != "role"):
                return True
    return False
