"""The middleware before an application that asks an engine and answers as vLLM's does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvicorn

from penstock.bench.local import free_port
from penstock.vllm.middleware import Middleware
from penstock.vllm.verdict import Verdict

EXPIRED = Verdict("expired", "the ttft promise of 0.5 s was missed").encode()
REFUSED = Verdict("refused", "8 requests wait", "", "max_waiting", 2.5, 3).encode()
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@dataclass
class Params:
    extra_args: dict[str, Any] | None = None
    n: int = 1


def output(*tokens: int, finish: str | None = None, stop: object = None) -> Any:
    one = SimpleNamespace(token_ids=tokens, finish_reason=finish, stop_reason=stop)
    return SimpleNamespace(outputs=[one])


@dataclass
class Engine:
    """vLLM's client of its engine: says the same to everybody."""

    says: list[Any]
    asked: list[Params] = field(default_factory=list)
    left: int = 0

    async def generate(self, _prompt: str, params: Params, _name: str) -> AsyncIterator[Any]:
        self.asked.append(params)
        try:
            for one in self.says:
                await asyncio.sleep(0)
                yield one
        except GeneratorExit:
            self.left += 1
            raise


@dataclass
class Application:
    """Answers with what the engine says: whole, or event by event.

    ``first`` is said before the engine is asked; ``breaks``: what a verdict makes of it.
    """

    streams: bool = False
    first: tuple[bytes, ...] = ()
    breaks: type[Exception] | None = None
    asks: int = 1
    seen: list[bytes] = field(default_factory=list)
    shared: Params = field(default_factory=Params)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append(body)
        engine = scope["app"].state.engine_client
        said = [engine.generate("x", self.shared, f"r{i}") for i in range(self.asks)]
        await (self._stream if self.streams else self._whole)(said, send)

    async def _whole(self, said: list[Any], send: Any) -> None:
        answer = []
        for one in said:
            async for output in one:
                answer.append(output.outputs[0].finish_reason)
                if self.breaks is not None:
                    raise self.breaks
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        whole = json.dumps(answer).encode()
        for part in (whole[:3], whole[3:]):
            await send({"type": "http.response.body", "body": part, "more_body": part == whole[:3]})

    async def _stream(self, said: list[Any], send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        for part in self.first:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        for one in said:
            async for output in one:
                tokens = list(output.outputs[0].token_ids)
                event = b"data: " + json.dumps(tokens).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


class Client:
    """Sends one request and keeps what comes."""

    def __init__(
        self, app: Callable[..., Any], *says: Any, plugin: dict[str, Any] | None = None
    ) -> None:
        self.engine = Engine(list(says) or [output(1, finish="stop")])
        config = SimpleNamespace(additional_config={"penstock": plugin or {}})
        state = SimpleNamespace(vllm_config=config, engine_client=self.engine)
        self._state = SimpleNamespace(state=state)
        self._app = Middleware(app)
        self.messages: list[Any] = []

    async def post(
        self, body: object, path: str = "/v1/completions", **headers: str
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        half = len(raw) // 2
        incoming = [
            {"type": "http.request", "body": raw[:half], "more_body": True},
            {"type": "http.request", "body": raw[half:], "more_body": False},
        ]

        async def receive() -> Any:
            return incoming.pop(0)

        async def send(message: Any) -> None:
            self.messages.append(message)

        headers = {"content_type": "application/json", **headers}
        given = [(name.replace("_", "-").encode(), word.encode()) for name, word in headers.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": given,
            "app": self._state,
        }
        self.messages.clear()
        await self._app(scope, receive, send)
        start, *rest = self.messages
        assert [one.get("more_body", False) for one in rest] == [True] * (len(rest) - 1) + [False]
        body_bytes = b"".join(one["body"] for one in rest)
        return start["status"], dict(start["headers"]), body_bytes

    @property
    def asked(self) -> dict[str, Any]:
        """What the engine was told last, less the answer's names."""
        told = self.engine.asked[-1].extra_args or {}
        return {name: value for name, value in told.items() if not name.startswith("penstock")}


async def test_a_body_passes_as_it_is_and_its_answer_has_a_name() -> None:
    app = Application(asks=2, shared=Params({"mine": 1}, 2))
    client = Client(app)
    status, _, answer = await client.post({"prompt": "x", "n": 2}, x_request_id="hers")
    told = client.engine.asked[0].extra_args or {}
    assert (told["penstock_choices"], told["penstock_clients_id"]) == (2, "hers")
    assert (status, answer) == (200, b'["stop", "stop"]')
    assert json.loads(app.seen[0]) == {"prompt": "x", "n": 2}
    names = [one.extra_args["penstock_answer"] for one in client.engine.asked if one.extra_args]
    assert len(names) == 2
    assert names[0] == names[1]
    assert len(names[0]) == 32
    assert app.shared.extra_args == {"mine": 1}  # what routes share stays theirs
    await client.post({})
    assert client.engine.asked[-1].extra_args["penstock_answer"] != names[0]  # type: ignore[index]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/x"])
async def test_headers_and_the_slo_member_reach_the_scheduler_by_every_route(path: str) -> None:
    app = Application(shared=Params({"mine": 1}))
    client = Client(app, plugin={"slo": {"chat": {"ttft": 1}}})
    body = {"prompt": "x", "slo": {"ttft_ms": 500}}
    await client.post(body, path, x_slo_class="chat", x_slo_gap_ms="250")
    assert client.asked == {
        "mine": 1, "slo_class": "chat", "slo_ttft_ms": 500.0, "slo_gap_ms": 250.0,
    }  # fmt: skip


async def test_a_body_that_is_no_json_has_headers_all_the_same() -> None:
    client = Client(Application())
    await client.post(b"--x", content_type="multipart/form-data", x_slo_e2e_ms="9")
    assert client.asked == {"slo_e2e_ms": 9.0}


async def test_beam_search_has_no_promise() -> None:
    client = Client(Application())
    await client.post({"use_beam_search": True}, x_slo_ttft_ms="5")
    assert client.asked == {}


async def test_the_hook_for_benchmarks_goes_along() -> None:
    client = Client(Application(), plugin={"bench": {"trace_lengths": True}})
    await client.post({"prompt": "x", "trace_output_tokens": 7})
    assert client.asked == {"trace_output_tokens": 7}
    for wrong in (0, 10**30, True, 1.5, "7", [[7]]):
        status, _, answer = await client.post({"trace_output_tokens": wrong})
        assert status == 400
        assert json.loads(answer)["error"]["param"] == "trace_output_tokens"


async def test_without_the_hook_nothing_of_it_reaches_the_engine() -> None:
    client = Client(Application())
    await client.post({"prompt": "x", "trace_output_tokens": [[[7]]]})
    assert client.asked == {}


async def test_a_body_is_read_as_vllm_reads_it() -> None:
    client = Client(Application())
    for body in (
        b'{"top_p": NaN, "slo": {"e2e_ms": 9}}',
        '\ufeff{"slo": {"e2e_ms": 9}}'.encode(),
        '{"slo": {"e2e_ms": 9}}'.encode("utf-16"),
        b'{"prompt": "\\ud800", "slo": {"e2e_ms": 9}}',
    ):
        await client.post(body, content_type="Application/JSON; charset=utf-8")
        assert client.asked == {"slo_e2e_ms": 9.0}, body


async def test_a_member_that_is_null_says_nothing_against_a_header() -> None:
    client = Client(Application(), plugin={"slo": {"chat": {"ttft": 1}}})
    await client.post({"slo": {"class": None, "ttft_ms": None}}, x_slo_class="chat")
    assert client.asked == {"slo_class": "chat"}


async def test_a_body_is_not_read_before_somebody_wants_it() -> None:
    async def closed(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    status, _, answer = await Client(closed).post(b"", x_slo_ttft_ms="soon")
    assert (status, answer) == (401, b"")


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"slo": {"ttft_ms": -1}}, {}, "slo.ttft_ms"),
        ({"slo": {"speed": 1}}, {}, "slo.speed"),
        ({"slo": "fast"}, {}, "slo"),
        ({"slo": {"class": ["a"]}}, {}, "slo.class"),
        ({"slo": {"ttft_ms": 10**400}}, {}, "slo.ttft_ms"),
        ({}, {"x_slo_ttft_ms": "soon"}, "x-slo-ttft-ms"),
        ({}, {"x_slo_class": "nobody"}, "x-slo-class"),
        ({"slo": {"ttft_ms": 1}}, {"x_slo_ttft_ms": "2"}, "slo.ttft_ms"),
        ({"slo": {"ttft_ms": 1}}, {}, "vllm_xargs.slo_ttft_ms"),
    ],
)
async def test_a_wrong_promise_is_told_and_the_engine_never_hears_of_it(
    body: dict[str, object], headers: dict[str, str], param: str
) -> None:
    more = {"slo_ttft_ms": 2} if param.startswith("vllm") else None
    client = Client(Application(shared=Params(more)))
    status, _, answer = await client.post({"prompt": "x", **body}, **headers)
    assert status == 400
    assert json.loads(answer)["error"]["param"] == param
    assert client.engine.asked == []


@pytest.mark.parametrize("body", [b"not json", b'["slo"]'])
async def test_what_is_no_request_asks_for_nothing(body: bytes) -> None:
    client = Client(Application())
    status, _, _ = await client.post(body, x_slo_ttft_ms="5")
    assert status == 200
    assert client.asked == {"slo_ttft_ms": 5.0}


async def test_a_refusal_is_429_with_the_time_to_come_back() -> None:
    client = Client(Application(asks=2), output(finish="abort", stop=REFUSED))
    status, headers, answer = await client.post({})
    assert (status, headers[b"retry-after"]) == (429, b"3")
    error = json.loads(answer)["error"]
    assert (error["code"], error["limit"], error["predicted_wait_s"]) == (
        "queue_full", "max_waiting", 2.5,
    )  # fmt: skip


async def test_an_application_that_stumbles_over_a_verdict_is_answered_for() -> None:
    client = Client(Application(breaks=AssertionError), output(finish="abort", stop=EXPIRED))
    status, _, _ = await client.post({})
    assert status == 504
    client = Client(Application(breaks=KeyError), output(1, finish="stop"))
    with pytest.raises(KeyError):
        await client.post({})


async def test_who_stops_listening_stops_the_engine() -> None:
    async def hasty(scope: Any, _receive: Any, send: Any) -> None:
        outputs = scope["app"].state.engine_client.generate("x", Params(), "r")
        await anext(outputs)
        await outputs.aclose()
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": b"{}"})

    client = Client(hasty, output(7), output(8))
    await client.post({})
    assert client.engine.left == 1


@pytest.mark.parametrize("said", [None, "stop here"])
async def test_an_abort_that_is_not_penstocks_passes(said: object) -> None:
    status, _, answer = await Client(Application(), output(finish="abort", stop=said)).post({})
    assert (status, answer) == (200, b'["abort"]')


async def test_a_stop_string_with_the_words_is_not_a_verdict() -> None:
    status, _, _ = await Client(Application(), output(1, finish="stop", stop=EXPIRED)).post({})
    assert status == 200


@pytest.mark.parametrize("first", [(), (ROLE,)])
async def test_a_stream_that_never_began_is_a_status(first: tuple[bytes, ...]) -> None:
    app = Application(streams=True, first=first)
    status, headers, answer = await Client(app, output(finish="abort", stop=EXPIRED)).post({})
    assert status == 504
    assert headers[b"x-should-retry"] == b"false"
    assert json.loads(answer)["error"]["code"] == "deadline_exceeded"


async def test_a_stream_that_had_begun_ends_with_an_error_event() -> None:
    app = Application(streams=True, first=(ROLE,))
    client = Client(app, output(7), output(finish="abort", stop=EXPIRED))
    status, _, answer = await client.post({})
    assert status == 200
    role, token, error, nothing = answer.split(b"\n\n")
    assert (role + b"\n\n", token, nothing) == (ROLE, b"data: [7]", b"")
    name, data = error.split(b"\n")
    assert name == b"event: error"
    said = msgspec.json.decode(data.removeprefix(b"data: "))
    assert said["type"] == "error"
    assert said["error"]["code"] == "deadline_exceeded"


async def test_what_keeps_a_connection_alive_is_not_held() -> None:
    app = Application(streams=True, first=(ROLE, b": keep-alive\n\n", b": keep-alive\n\n"))
    client = Client(app, output(finish="abort", stop=EXPIRED))
    status, _, answer = await client.post({})
    assert status == 200
    assert [one["body"] for one in client.messages[1:3]] == [ROLE, b": keep-alive\n\n"]
    assert b"deadline_exceeded" in answer


async def test_an_error_keeps_what_other_middlewares_wrote() -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        async for _ in scope["app"].state.engine_client.generate("x", Params(), "r"):
            pass
        headers = [*JSON, (b"content-length", b"2"), (b"access-control-allow-origin", b"*")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    client = Client(app, output(finish="abort", stop=REFUSED))
    status, headers, answer = await client.post({})
    assert status == 429
    assert headers == {
        b"content-type": b"application/json",
        b"content-length": str(len(answer)).encode(),
        b"access-control-allow-origin": b"*",
        b"retry-after": b"3",
    }


@asynccontextmanager
async def serving(application: Any) -> AsyncIterator[str]:
    """An application behind a real socket; its address."""
    port = free_port()
    config = uvicorn.Config(application, port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def test_anthropics_client_hears_of_a_stream_that_breaks_off() -> None:
    anthropic = pytest.importorskip("anthropic", reason="vLLM brings it: make test-vllm")
    app = Application(streams=True, first=(b"event: ping\ndata: {}\n\n",))
    client = Client(app, output(7), output(finish="abort", stop=EXPIRED))

    async def served(scope: Any, receive: Any, send: Any) -> None:
        await client._app({**scope, "app": client._state}, receive, send)

    async def read(url: str) -> None:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as claude:
            said = await claude.messages.create(
                model="x", max_tokens=9, messages=[{"role": "user", "content": "x"}], stream=True
            )
            async for _ in said:
                pass

    async with serving(served) as url:
        with pytest.raises(anthropic.APIStatusError) as late:
            await read(url)
    assert late.value.body["error"]["code"] == "deadline_exceeded"


async def test_a_stream_is_held_until_its_first_token_and_no_longer() -> None:
    app = Application(streams=True, first=(ROLE,))
    client = Client(app, output(), output(7), output(8, finish="stop"))
    _, _, answer = await client.post({})
    assert answer == ROLE + b"data: []\n\ndata: [7]\n\ndata: [8]\n\n" + DONE
    assert [one["body"] for one in client.messages[1:]] == [
        ROLE, b"data: []\n\n", b"data: [7]\n\n", b"data: [8]\n\n", DONE,
    ]  # fmt: skip

    sent_at: list[int] = []

    async def slow(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.body", "body": ROLE, "more_body": True})
        sent_at.append(len(client.messages))
        async for _ in _scope["app"].state.engine_client.generate("x", Params(), "r"):
            await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
            sent_at.append(len(client.messages))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    client = Client(slow, output(7), output(8))
    await client.post({})
    assert sent_at == [0, 3, 4]


async def test_an_answer_to_nothing_still_ends() -> None:
    app = Application(streams=True, asks=0)
    _, _, answer = await Client(app).post({})
    assert answer == DONE


async def test_work_in_background_is_cancelled() -> None:
    told: list[str] = []

    async def background(scope: Any, _receive: Any, send: Any) -> None:
        outputs = scope["app"].state.engine_client.generate("x", Params(), "r")
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})
        try:
            told.extend([str(one) async for one in outputs])
        except asyncio.CancelledError as error:
            told.append(str(error))

    status, _, _ = await Client(background, output(finish="abort", stop=REFUSED)).post({})
    assert status == 200
    assert told == ["8 requests wait"]


async def test_requests_at_the_same_time_are_not_mixed_up() -> None:
    app = Application()
    client = Client(app)
    middleware, state = client._app, client._state
    answers: dict[int, Any] = {}

    async def one(i: int) -> None:
        async def receive() -> Any:
            await asyncio.sleep(0.001 * (i % 3))
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Any) -> None:
            answers[i] = message.get("body")

        headers = [(b"x-slo-ttft-ms", str(i).encode()), *JSON]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "app": state}
        await middleware(scope, receive, send)

    await asyncio.gather(*(one(i) for i in range(1, 20)))
    asked = [one.extra_args or {} for one in client.engine.asked]
    assert sorted(one["slo_ttft_ms"] for one in asked) == list(range(1, 20))
    assert len({one["penstock_answer"] for one in asked}) == 19


async def test_what_is_no_request_for_an_answer_is_left_alone() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    for scope in ({"type": "http", "method": "GET"}, {"type": "websocket"}, {"type": "lifespan"}):
        receive, send = object(), object()
        await Middleware(app)(scope, receive, send)  # type: ignore[arg-type]
        assert seen[-1] == (scope, receive, send)
