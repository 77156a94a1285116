"""What is refused, with which status, code and parameter."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest

from tests.server.harness import Server

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "demo", "prompt": "hi"}

BOTH: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": -1}, "top_k", "invalid_value"),
    ({"min_p": 1.5}, "min_p", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5\n": 1}}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop[0]", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"seed": "x"}, "seed", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"nonsense": 1}, "nonsense", "unknown_parameter"),
    ({"priority": 3}, "priority", "unsupported_parameter"),
    ({"slo": {"class": "absent"}}, "slo.class", "invalid_value"),
    ({"slo": {"ttft_ms": -1}}, "slo.ttft_ms", "invalid_value"),
    ({"slo": {"ttft_ms": 1e-323}}, "slo.ttft_ms", "invalid_value"),
    ({"slo": {"ttft": 1}}, "slo.ttft", "unknown_parameter"),
    ({"slo": {"ttft-ms": 500}}, "slo.'ttft-ms'", "unknown_parameter"),
    ({"slo": {"str": 500}}, "slo.str", "unknown_parameter"),
    ({"guided.json": 1}, "'guided.json'", "unknown_parameter"),
    ({"": 1}, "''", "unknown_parameter"),
    ({"y" * 5000: 1}, "y" * 80, "unknown_parameter"),
    ({"max_tokens": 5000}, "max_tokens", "context_length_exceeded"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "invalid_value",
    ),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"logprobs": 3}, "logprobs", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    ({"tools": []}, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "unsupported_parameter"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
]
PLAIN_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": 5}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [1, "x"]}, "prompt", "invalid_value"),
    ({"prompt": [True]}, "prompt", "invalid_value"),
    ({"prompt": [4096]}, "prompt", "invalid_value"),
    ({"prompt": "word " * 5000}, "prompt", "context_length_exceeded"),
    ({"prompt": ["x"] * 65, "n": 2}, "n", "invalid_value"),
    ({"prompt": ["x"] * 129}, "prompt", "invalid_value"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"messages": []}, "messages", "unknown_parameter"),
]


def check(server: Server, path: str, body: dict[str, Any], param: str, code: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error"
    assert re.split(r"\W", param)[0] in error["message"]


@pytest.mark.parametrize(("change", "param", "code"), BOTH + CHAT_ONLY)
def test_chat_refuses(server: Server, change: dict[str, Any], param: str, code: str) -> None:
    check(server, "/v1/chat/completions", CHAT | change, param, code)


@pytest.mark.parametrize(("change", "param", "code"), BOTH + PLAIN_ONLY)
def test_plain_refuses(server: Server, change: dict[str, Any], param: str, code: str) -> None:
    check(server, "/v1/completions", PLAIN | change, param, code)


@pytest.mark.parametrize(
    "change",
    [
        {"user": "u", "metadata": {"k": "v"}, "store": False},
        {"temperature": None, "stop": None, "seed": None, "stream_options": None, "tools": None},
        {"n": 1, "stream": False, "top_p": 1, "temperature": 1, "stop": [], "logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
                {"role": "user", "content": "hi"},
            ]
        },
    ],
)
def test_accepted_without_effect(server: Server, change: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", CHAT | change | {"max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"'])
def test_body_that_is_no_json_object(server: Server, raw: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-9", prompt="x")
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"
    assert "demo" in error.value.message


def test_long_body(server: Server) -> None:
    body = b"x" * (5 << 20)
    declared = httpx.post(f"{server.url}/v1/completions", content=body)
    chunked = httpx.post(f"{server.url}/v1/completions", content=iter([body]))
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_long_head(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"x-filler": "y" * 40_000})
    assert answer.status_code == 431


def test_unknown_route_and_method(server: Server) -> None:
    assert server.get("/v1/embeddings").json()["error"]["code"] == "route_not_found"
    answer = server.get("/v1/completions")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_api_keys_and_hooks_of_benchmarks() -> None:
    with Server("--api-keys", "first", "--api-keys", "second") as locked:
        for key, status in (("first", 200), ("second", 200), ("third", 401), ("é", 401)):
            headers = {"authorization": f"Bearer {key}".encode()}
            body = PLAIN | {"max_tokens": 1}
            assert locked.post("/v1/completions", body, headers).status_code == status
        assert locked.post("/v1/completions", PLAIN).status_code == 401
        assert locked.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert locked.get("/health").status_code == 200
        assert "first" not in locked.log
        headers = {"authorization": "Bearer first"}
        hook = locked.post("/v1/completions", PLAIN | {"trace_output_tokens": 5}, headers)
        assert hook.status_code == 400
        assert hook.json()["error"]["param"] == "trace_output_tokens"
        assert "--trace-lengths" in hook.json()["error"]["message"]
        with locked.client(api_key="second") as client:
            assert client.models.list().data[0].id == "demo"
