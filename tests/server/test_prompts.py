"""Long work on a body stays off the event loop, and some is never begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest

from penstock.server.errors import ApiError
from penstock.server.prompts import chat_prompt, completion_prompts
from penstock.server.requests import ChatBody, CompletionBody, parse
from penstock.server.service import Service
from penstock.settings import Config
from penstock.text.tokenizer import TextTokenizer


class Tokenizer:
    """Notes which threads it ran in."""

    vocab_size = 100

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def encode(self, text: str) -> list[int]:
        self.threads.add(threading.get_ident())
        return [len(text)]

    def apply_chat_template(self, messages: Sequence[object]) -> list[int]:
        self.threads.add(threading.get_ident())
        return [len(messages)]

    @property
    def on_the_loop(self) -> bool:
        return threading.get_ident() in self.threads


def plain(prompt: object) -> CompletionBody:
    return CompletionBody.model_validate({"model": "demo", "prompt": prompt})


def chat(messages: int, content: str = "") -> ChatBody:
    message = {"role": "user", "content": content}
    return ChatBody.model_validate({"model": "demo", "messages": [message] * messages})


@pytest.mark.parametrize(
    ("prompt", "on_the_loop"),
    [("short", True), (["a", "b"], True), ("x" * 5000, False), (["x" * 100] * 50, False)],
)
async def test_many_texts_are_as_long_as_one(prompt: object, on_the_loop: bool) -> None:
    tokenizer = Tokenizer()
    prompts = await completion_prompts(cast("TextTokenizer", tokenizer), plain(prompt))
    texts = [prompt] if isinstance(prompt, str) else cast("list[str]", prompt)
    assert prompts == [[len(text)] for text in texts]
    assert tokenizer.on_the_loop is on_the_loop
    assert len(tokenizer.threads) == 1


@pytest.mark.parametrize(
    ("body", "on_the_loop"), [(chat(3), True), (chat(200), False), (chat(1, "x" * 5000), False)]
)
async def test_empty_messages_have_a_length(body: ChatBody, on_the_loop: bool) -> None:
    tokenizer = Tokenizer()
    prompts = await chat_prompt(cast("TextTokenizer", tokenizer), body)
    assert prompts == [[len(body.messages)]]
    assert tokenizer.on_the_loop is on_the_loop


MANY = {str(token): 1 for token in range(3000)}


@pytest.mark.parametrize(
    ("n", "extra", "param", "most"),
    [(1, {}, "prompt", 128), (2, {}, "n", 128), (42, {"logit_bias": MANY}, "logit_bias", 2080)],
)
async def test_too_much_is_not_tokenized(
    n: int, extra: dict[str, Any], param: str, most: int
) -> None:
    tokenizer = Tokenizer()
    nothing = cast("Any", None)
    text = cast("TextTokenizer", tokenizer)
    service = Service(Config(), "demo", text, nothing, nothing, time.time(), priorities=False)
    raw = msgspec.json.encode({"model": "demo", "prompt": ["a"] * (130 // n), "n": n, **extra})
    with pytest.raises(ApiError, match=f"at most {most}") as refusal:
        await service.complete(raw, {})
    assert refusal.value.param == param
    assert tokenizer.threads == set()


@pytest.mark.parametrize("long", [True, False])
async def test_long_bodies_are_checked_off_the_loop(
    monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    threads: list[int] = []

    def refuse(kind: object, raw: bytes) -> None:
        del kind, raw
        threads.append(threading.get_ident())
        raise ApiError(400, "as is wanted here", code="test")

    monkeypatch.setattr("penstock.server.service.parse", refuse)
    nothing = cast("Any", None)
    service = Service(Config(), "demo", nothing, nothing, nothing, time.time(), priorities=False)
    with pytest.raises(ApiError, match="as is wanted"):
        await service.chat(b"x" * (100_000 if long else 100), {})
    assert (threads == [threading.get_ident()]) is not long


JUNK = {f"k{number}": None for number in range(9)} | dict.fromkeys(map(str, range(300_000)), 1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"messages": [[{}]] * 100_000}, "messages"),
        ({"prompt": [[{}]] * 100_000}, "prompt"),
        ({"prompt": "x", **JUNK}, "'0'"),
        ({"prompt": "x", "slo": JUNK}, "slo.k0"),
        ({"prompt": "x", "logit_bias": {"5": 1, **dict.fromkeys(JUNK, "x")}}, "logit_bias"),
        ({"prompt": "x", "metadata": JUNK}, "metadata"),
        ({"messages": [{"role": "user", "content": "x", **JUNK}]}, "messages[0].'0'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_million_faults_are_one(body: dict[str, object], told: str) -> None:
    kind = ChatBody if "messages" in body else CompletionBody
    raw = msgspec.json.encode({"model": "demo", **body})
    began = time.process_time()
    with pytest.raises(ApiError) as refusal:
        parse(kind, raw)
    assert time.process_time() - began < 0.5
    assert (refusal.value.param or "").startswith(told)
