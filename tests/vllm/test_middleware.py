"""The middleware before an application that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from penstock.vllm.middleware import Middleware
from penstock.vllm.verdict import Verdict

EXPIRED = Verdict("expired", "the ttft promise of 0.5 s was missed").encode()
REFUSED = Verdict("refused", "8 requests wait", "", "max_waiting", 2.5, 3).encode()
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def chunk(
    text: str | None, finish: str | None = None, stop: object = None, *, chat: bool = False
) -> bytes:
    said = {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
    choice = {"index": 0, **said, "finish_reason": finish, "stop_reason": stop}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
DONE = b"data: [DONE]\n\n"


CONFIG = SimpleNamespace(additional_config={})
POST = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "app": SimpleNamespace(state=SimpleNamespace(vllm_config=CONFIG)),
}


class Fake:
    """An application; ``parts`` are the messages of its answer's body."""

    def __init__(
        self, *parts: bytes, status: int = 200, headers: list[tuple[bytes, bytes]] = JSON
    ) -> None:
        self.parts, self.status, self.headers = parts, status, headers
        self.seen: list[dict[str, Any]] = []
        self.broken_off = False

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append(body)  # type: ignore[arg-type]
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        gone = asyncio.ensure_future(receive())
        for index, part in enumerate(self.parts):
            last = index == len(self.parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": not last})
            await asyncio.sleep(0)
        await asyncio.wait([gone], timeout=0.01)
        self.broken_off = gone.done() and gone.result()["type"] == "http.disconnect"
        gone.cancel()


class Client:
    """Sends one request and keeps what comes."""

    def __init__(self, app: Callable[..., Any], plugin: dict[str, Any] | None = None) -> None:
        config = SimpleNamespace(additional_config={"penstock": plugin or {}})
        self._state = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
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
            if incoming:
                return incoming.pop(0)
            await asyncio.Event().wait()
            return None

        async def send(message: Any) -> None:
            self.messages.append(message)

        given = [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [*given, (b"content-length", str(len(raw)).encode())],
            "app": self._state,
        }
        await self._app(scope, receive, send)
        start, *rest = self.messages
        body_bytes = b"".join(one["body"] for one in rest)
        return start["status"], dict(start["headers"]), body_bytes


ANSWER = json.dumps({"choices": [{"text": "hi", "finish_reason": "stop", "stop_reason": None}]})


async def test_the_answer_gets_a_name_and_all_else_stays() -> None:
    app = Fake(ANSWER.encode())
    status, _, answer = await Client(app).post({"prompt": "x", "n": 2})
    assert (status, answer) == (200, ANSWER.encode())
    seen = json.loads(app.seen[0])  # type: ignore[arg-type]
    assert len(seen.pop("vllm_xargs")["penstock_answer"]) == 32
    assert seen == {"prompt": "x", "n": 2}


@pytest.mark.parametrize("more", [{"use_beam_search": True}, {"echo": True, "logprobs": 1}])
async def test_where_vllm_could_not_carry_a_verdict_none_is_asked_for(more: dict[str, Any]) -> None:
    app = Fake(ANSWER.encode())
    await Client(app).post({"prompt": "x", **more}, x_slo_ttft_ms="5")
    assert json.loads(app.seen[0])["vllm_xargs"] == {"slo_ttft_ms": 5.0}  # type: ignore[arg-type]


async def test_a_body_is_not_read_before_somebody_wants_it() -> None:
    async def closed(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def never() -> Any:
        raise AssertionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {**POST, "headers": []}
    await Middleware(closed)(scope, never, send)
    assert sent[0]["status"] == 401


async def test_headers_and_the_slo_member_reach_the_scheduler() -> None:
    app = Fake(ANSWER.encode())
    client = Client(app, {"slo": {"chat": {"ttft": 1}}})
    await client.post(
        {"prompt": "x", "slo": {"ttft_ms": 500}, "vllm_xargs": {"mine": 1}},
        x_slo_class="chat",
        x_slo_gap_ms="250",
    )
    body = json.loads(app.seen[0])  # type: ignore[arg-type]
    del body["vllm_xargs"]["penstock_answer"]
    assert body == {
        "prompt": "x",
        "vllm_xargs": {"mine": 1, "slo_class": "chat", "slo_ttft_ms": 500.0, "slo_gap_ms": 250.0},
    }


async def test_the_hook_for_benchmarks_goes_along() -> None:
    app = Fake(ANSWER.encode())
    await Client(app).post({"prompt": "x", "trace_output_tokens": 7})
    body = json.loads(app.seen[0])  # type: ignore[arg-type]
    assert body["vllm_xargs"]["trace_output_tokens"] == 7


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
        ({"slo": {"ttft_ms": 1}, "vllm_xargs": {"slo_ttft_ms": 2}}, {}, "vllm_xargs.slo_ttft_ms"),
    ],
)
async def test_a_wrong_promise_is_told_before_vllm_hears_of_it(
    body: dict[str, object], headers: dict[str, str], param: str
) -> None:
    app = Fake(ANSWER.encode())
    status, _, answer = await Client(app).post({"prompt": "x", **body}, **headers)
    assert status == 400
    assert json.loads(answer)["error"]["param"] == param
    assert app.seen == []


@pytest.mark.parametrize("body", [b"not json", b'["slo"]', b'{"slo":{"ttft_ms":5},"vllm_xargs":3}'])
async def test_what_is_no_request_is_vllms_to_refuse(body: bytes) -> None:
    app = Fake(b"{}", status=400)
    status, _, _ = await Client(app).post(body, x_slo_ttft_ms="5")
    assert status == 400
    assert app.seen == [body]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/health"])
async def test_other_paths_are_left_alone(path: str) -> None:
    app = Fake(ANSWER.encode())
    await Client(app).post({"slo": "anything"}, path)
    assert json.loads(app.seen[0]) == {"slo": "anything"}  # type: ignore[arg-type]


async def test_a_refusal_is_429_with_the_time_to_come_back() -> None:
    body = json.dumps({"choices": [{"text": "", "finish_reason": "abort", "stop_reason": REFUSED}]})
    status, headers, answer = await Client(Fake(body[:30].encode(), body[30:].encode())).post({})
    assert (status, headers[b"retry-after"]) == (429, b"3")
    error = json.loads(answer)["error"]
    assert (error["code"], error["limit"], error["predicted_wait_s"]) == (
        "queue_full", "max_waiting", 2.5,
    )  # fmt: skip


async def test_an_abort_that_is_not_penstocks_passes() -> None:
    body = json.dumps({"choices": [{"text": "a", "finish_reason": "abort", "stop_reason": None}]})
    status, _, answer = await Client(Fake(body.encode())).post({})
    assert (status, answer) == (200, body.encode())


async def test_a_model_that_says_the_words_is_not_a_verdict() -> None:
    said = json.dumps({"choices": [{"text": f'"abort" {EXPIRED}', "finish_reason": "stop"}]})
    status, _, answer = await Client(Fake(said.encode())).post({})
    assert (status, answer) == (200, said.encode())


@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_that_never_began_is_a_status(*, chat: bool) -> None:
    end = chunk(None, "abort", EXPIRED, chat=chat)
    parts = [ROLE, end, DONE] if chat else [end, DONE]
    app = Fake(*parts, headers=EVENTS)
    status, headers, answer = await Client(app).post({})
    assert status == 504
    assert headers[b"x-should-retry"] == b"false"
    assert json.loads(answer)["error"]["code"] == "deadline_exceeded"
    assert app.broken_off


@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_that_had_begun_ends_with_an_error_event(*, chat: bool) -> None:
    parts = [ROLE] * chat + [chunk("hi", chat=chat), chunk(None, "abort", EXPIRED, chat=chat), DONE]
    status, _, answer = await Client(Fake(*parts, headers=EVENTS)).post({})
    assert status == 200
    events = answer.split(b"\n\n")
    assert b'"hi"' in events[chat]
    error = msgspec.json.decode(events[1 + chat].removeprefix(b"data: "))["error"]
    assert error["code"] == "deadline_exceeded"
    assert events[2 + chat :] == [b""]


async def test_a_stream_passes_event_by_event_and_whole() -> None:
    parts = [ROLE, chunk("a", chat=True), chunk("b", "stop", chat=True), DONE]
    client = Client(Fake(*parts, headers=EVENTS))
    _, _, answer = await client.post({})
    assert answer == b"".join(parts)
    bodies = [one["body"] for one in client.messages[1:]]
    assert bodies[0] == ROLE + parts[1]  # a role alone says nothing yet
    assert bodies[1] == parts[2]


async def test_events_torn_apart_between_messages_are_put_together() -> None:
    whole = ROLE + chunk("a", chat=True) + chunk(None, "abort", EXPIRED, chat=True) + DONE
    for cut in range(1, len(whole), 7):
        client = Client(Fake(whole[:cut], whole[cut:], headers=EVENTS))
        _, _, answer = await client.post({})
        assert answer.startswith(ROLE + chunk("a", chat=True))
        assert b"deadline_exceeded" in answer
        assert DONE not in answer


async def test_an_answer_to_nothing_still_ends() -> None:
    _, _, answer = await Client(Fake(DONE, headers=EVENTS)).post({})
    assert answer == DONE


async def test_a_client_that_leaves_before_its_request_is_whole_costs_nothing() -> None:
    app = Fake(ANSWER.encode())

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {**POST, "headers": []}
    await Middleware(app)(scope, gone, send)
    assert app.seen == []
