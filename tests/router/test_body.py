"""What a router reads of a request, what it refuses, and its flags."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.config import ConfigError
from penstock.router.body import UNCONTINUABLE, cap_of, decode, fault, parse
from penstock.router.settings import Settings
from penstock.server.errors import ApiError

PLAIN = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("logprobs", 0),
        ("logprobs", 5),
        ("prompt_logprobs", 0),
        ("suffix", "end"),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("response_format", {"type": "json_object"}),
        ("guided_regex", "a+"),
        ("return_token_ids", True),
        ("prompt", ["a", "b"]),
        ("prompt", [[1], [2]]),
    ],
)
def test_what_cannot_be_continued_is_named(name: str, value: Any) -> None:
    assert fault({**PLAIN, name: value}) == name


@pytest.mark.parametrize(
    "more",
    [
        dict.fromkeys(UNCONTINUABLE),
        {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"response_format": {"type": "text"}, "suffix": "", "logprobs": None},
        {"prompt": ["one"]},
        {"prompt": [[1, 2]]},
        {"prompt": [1, 2]},
    ],
)
def test_neutral_values_pass(more: dict[str, Any]) -> None:
    assert fault({**PLAIN, **more}) is None


def test_a_list_of_one_is_that_one() -> None:
    assert parse({**PLAIN, "prompt": ["one"]}).prompt == "one"
    assert parse({**PLAIN, "prompt": [[1, 2]]}).prompt == [1, 2]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ["x", "y" * 1025]}, "stop"),
        ({"stop": "y" * 1025}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_what_must_be_understood_is_checked(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        parse({**PLAIN, **more})
    assert (error.value.status, error.value.param) == (400, param)


def test_many_long_stop_strings_are_taken() -> None:
    stops = [f"{number:1024}" for number in range(64)]
    assert parse({**PLAIN, "stop": stops}).stop == tuple(stops)


@pytest.mark.parametrize(
    ("raw", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"\xff", 400, None),
        (b"{}", 400, "model"),
        (b'{"model": "other"}', 404, "model"),
    ],
)
def test_bodies_that_are_none(raw: bytes, status: int, param: str | None) -> None:
    with pytest.raises(ApiError) as error:
        decode(raw, ["m"])
    assert (error.value.status, error.value.param) == (status, param)


def test_max_tokens_is_openais_when_absent() -> None:
    assert cap_of(PLAIN) == cap_of({**PLAIN, "max_tokens": None}) == 16


def test_a_slice_asks_for_its_own_part() -> None:
    asked = {**PLAIN, "max_tokens": 9, "stop": "x", "seed": (1 << 63) - 1, "min_tokens": 3, "n": 1}
    body = parse({**asked, "trace_output_tokens": 9, "user": "u"})
    first = json.loads(body.slice_body("x", 4, 0, ids=False))
    assert first == {
        "model": "m",
        "prompt": "x",
        "max_tokens": 4,
        "seed": (1 << 63) - 1,
        "min_tokens": 3,
        "trace_output_tokens": 9,
        "user": "u",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    later = json.loads(body.slice_body([1, 2], 4, 4, ids=True))
    assert (later["prompt"], later["return_token_ids"]) == ([1, 2], True)
    assert (later["seed"], later["min_tokens"], later["trace_output_tokens"]) == (3, 0, 5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"backend": ()}, "--backend is missing"),
        ({"backend": ("gpu:8000",)}, "--backend gpu:8000"),
        ({"backend": ("http://a:x",)}, "--backend http://a:x"),
        ({"backend": ("http://a", "http://a/v1/")}, "--backend http://a is given twice"),
        ({"slice_tokens": -1}, "--slice-tokens -1"),
        ({"slice_tokens": 1 << 21}, "--slice-tokens 2097152"),
        ({"place": "best"}, "--place best"),
        ({"place": "max-min", "slice_tokens": 0}, "--place max-min"),
        ({"gap_timeout": 0.0}, "--gap-timeout 0.0"),
        ({"gap_timeout": float("nan")}, "--gap-timeout nan"),
        ({"retries": -1}, "--retries -1"),
        ({"failures": 0}, "--failures 0"),
        ({"backoff": 3.0, "max_backoff": 2.0}, "--max-backoff 2.0"),
        ({"port": 70000}, "--port 70000"),
    ],
)
def test_flags_are_refused_by_name(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Settings(**{"backend": ("http://a",), **flags}).checked()
    assert words in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hush@gpu:8000",
        "http://hush@gpu:8000",
        "user:hush@gpu:8000",
        "http://user:hush#1@gpu:8000",
        "http://user:hush/1@gpu:8000",
        "http://user:hush@1@gpu:8000",
        "http://gpu:8000/v1?key=hush",
        "http://gpu:8000?key=1@hush",
        "http://gpu:x?key=hush",
        "http://user:hush@gpu:8000?key=hush",
        "http://gpu:8000#hush",
        "gpu:8000?hush",
        "http://gpu:8000?",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="--backend number 2 has") as error:
        Settings(backend=("http://a", url)).checked()
    assert "hush" not in str(error.value)
    assert "--api-key" in str(error.value)
