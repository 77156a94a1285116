"""One backend: its address, its circuit, and how it is talked to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Never

import aiohttp
import msgspec

from penstock.router.circuit import Circuit
from penstock.router.failures import NOT_JSON, BackendError, Kind, error_in_stream, error_of
from penstock.server.errors import ApiError

_CONNECT_SECONDS = 5.0
# Less than the 5 seconds after which uvicorn, and vLLM with it, closes an idle connection: a
# request that meets a connection which is being closed would count as a failure.
_KEEP_ALIVE = 3.0
# An answer that comes whole has no byte before its end, however well the backend works on it.
_UNTIL_THE_END = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
_BROKEN = frozenset({"abort", "error"})


class Piece(NamedTuple):
    """A chunk of a backend's stream.

    Attributes:
        ids: output ids that belong to it; None if the backend does not say.
        prompt_ids: the prompt's, in the first piece, if the backend says.
        finish: the finish reason, in the last piece with text.
        usage: (prompt tokens, output tokens) of the slice, at its end.
    """

    text: str
    ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    finish: str | None = None
    usage: tuple[int, int] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None
    prompt_token_ids: list[int] | None = None


_decode = msgspec.json.Decoder(_Event).decode


def open_session(gap_timeout: float) -> aiohttp.ClientSession:
    """Connections to all backends.

    Args:
        gap_timeout: seconds of silence after which a read fails, where nothing else is said.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=gap_timeout
        ),
    )


@dataclass(slots=True, eq=False)
class Backend:
    """One of the servers.

    Attributes:
        number: its name in the dispatcher.
        url: base address, without ``/v1``.
        returns_ids: whether it answers ``return_token_ids``; found out by probing.
        max_tokens: most prompt plus output tokens of a request, if it says.
        complaint: the last failure's words.
    """

    number: int
    url: str
    session: aiohttp.ClientSession
    circuit: Circuit
    api_key: str = field(default="", repr=False)
    returns_ids: bool = False
    max_tokens: int | None = None
    complaint: str = ""
    _owed: int = 0
    _watch: asyncio.Task[Never] | None = None

    @contextlib.asynccontextmanager
    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        patience: aiohttp.ClientTimeout | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose status is good.

        Args:
            patience: how long it may take; None: as the session says, so that silence is a failure.

        Raises:
            BackendError: it failed, now or while its body was read.
            ApiError: it says that the request is wrong.
        """
        headers = {"content-type": "application/json", **headers}
        with self._failures():
            # A redirected POST would arrive as a GET.
            sent = self.session.post(
                self.url + path,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=patience or self.session.timeout,
            )
            async with sent as response:
                if response.status >= 300:
                    raw = await response.read()
                    raise error_of(response.status, response.headers, self.url, raw)
                yield response

    async def whole(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """An answer that comes in one piece, however long it takes while the backend is there.

        Raises:
            BackendError: it failed, or no longer answers anything.
            ApiError: it says that the request is wrong.
        """
        reading = asyncio.ensure_future(self._read(path, body, headers))
        try:
            with self._watched() as watching:
                await asyncio.wait({reading, watching}, return_when=asyncio.FIRST_COMPLETED)
                return reading.result() if reading.done() else watching.result()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        async with self.post(path, body, headers, _UNTIL_THE_END) as response:
            return await response.read()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[asyncio.Task[Never]]:
        """A task that fails once the backend is gone; one for all answers that it owes."""
        watch = self._watch
        if watch is None or watch.done():
            watch = self._watch = asyncio.ensure_future(self._until_gone())
            # They may all be over by then.
            watch.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._owed += 1
        try:
            yield watch
        finally:
            self._owed -= 1
            if not self._owed and self._watch is not None:
                self._watch.cancel()
                self._watch = None

    async def _until_gone(self) -> Never:
        """Ask for its models now and then, until nothing is heard.

        A connection that is refused says nothing: so does a server that is shutting down while it
        finishes what it has, and one that is dead breaks the other connections as well.
        """
        pause = self.session.timeout.sock_read
        assert pause is not None
        while True:
            await asyncio.sleep(pause)
            try:
                await self.models()
            except BackendError as error:
                if error.kind is Kind.SILENT:
                    raise

    async def completion(self, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[Piece]:
        """The pieces of a streamed completion.

        Raises:
            BackendError: it failed before its end.
            ApiError: it says that the request is wrong.
        """
        finished = False
        async with self.post("/v1/completions", body, headers) as response:
            async for data in _events(response):
                if data == b"[DONE]":
                    break
                piece = self._piece(data)
                finished |= piece.finish is not None
                yield piece
        if not finished:
            raise BackendError(Kind.CUT, self.url, "the stream ended without a finish reason")

    async def models(self) -> list[dict[str, Any]]:
        """What it serves; notes the longest request.

        Raises:
            BackendError: it cannot be asked, or does not answer as OpenAI's servers do.
        """
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        with self._failures():
            async with self.session.get(f"{self.url}/v1/models", headers=headers) as response:
                raw = await response.read()
                status = response.status
        try:
            data = msgspec.json.decode(raw)["data"]
            usable = bool(data) and all(isinstance(model["id"], str) for model in data)
        except (*NOT_JSON, KeyError, TypeError):
            usable = False
        if status != 200 or not usable:
            shown = raw[:200].decode(errors="replace")
            msg = f"GET /v1/models answered HTTP {status}, without models: {shown}"
            raise BackendError(Kind.ERROR, self.url, msg)
        limit = data[0].get("max_model_len")
        self.max_tokens = limit if isinstance(limit, int) and limit > 1 else None
        return list(data)

    async def probe(self, model: str) -> None:
        """Have it make one token, and note whether it returns token ids.

        Raises:
            BackendError: it cannot.
        """
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        plain = {"model": model, "prompt": "1", "max_tokens": 1, "stream": True}
        try:
            self.returns_ids = await self._returns_ids({**plain, "return_token_ids": True}, headers)
        except ApiError:
            # It may be that the field is unknown there; then it works without.
            try:
                await self._returns_ids(plain, headers)
            except ApiError as error:
                msg = f"HTTP {error.status}: {error.message}"
                raise BackendError(Kind.ERROR, self.url, msg) from None
            self.returns_ids = False

    async def _returns_ids(self, body: dict[str, Any], headers: Mapping[str, str]) -> bool:
        prompt = output = False
        async with contextlib.aclosing(
            self.completion(msgspec.json.encode(body), headers)
        ) as pieces:
            async for piece in pieces:
                prompt |= bool(piece.prompt_ids)
                output |= bool(piece.ids)
        return prompt and output

    def _piece(self, data: bytes) -> Piece:
        try:
            event = _decode(data)
        except NOT_JSON as error:
            msg = f"an event is not what OpenAI sends: {error}"
            raise BackendError(Kind.ERROR, self.url, msg) from None
        if event.error is not None:
            raise error_in_stream(event.error, self.url)
        usage = None
        if event.usage is not None and event.usage.completion_tokens is not None:
            usage = (event.usage.prompt_tokens, event.usage.completion_tokens)
        if not event.choices:
            return Piece("", usage=usage)
        choice = event.choices[0]
        if choice.finish_reason in _BROKEN:
            msg = f"it ended the request with {choice.finish_reason!r}"
            raise BackendError(Kind.ERROR, self.url, msg)
        prompt_ids = choice.prompt_token_ids or event.prompt_token_ids
        return Piece(choice.text, choice.token_ids, prompt_ids, choice.finish_reason, usage)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """What goes wrong below HTTP, as the backend's failure."""
        try:
            yield
        except TimeoutError as error:
            msg = str(error) or "no answer in time"
            raise BackendError(Kind.SILENT, self.url, msg) from None
        except aiohttp.ClientPayloadError:
            msg = "the connection broke in the middle of the answer"
            raise BackendError(Kind.CUT, self.url, msg) from None
        except (aiohttp.ClientError, OSError) as error:
            msg = str(error) or type(error).__name__
            raise BackendError(Kind.CONNECTION, self.url, msg) from None


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event (OpenAI sends one data line per event)."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
