"""The official client against a real server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from penstock.core.engine import Work
from penstock.core.types import Capabilities
from penstock.models import demo_path
from penstock.testing import ScriptedEngine
from penstock.text import load_tokenizer
from tests.server.harness import Server, long_completion

TEXT = load_tokenizer(demo_path())
MESSAGES = [{"role": "user", "content": "What does a penstock do?"}]


def expected(prompt: list[int], cap: int, length: int | None = None) -> tuple[str, int]:
    """What the scripted engine says: its text, and how many tokens that is."""
    engine = ScriptedEngine(Capabilities(8, 16, 1, 16, 16), vocab_size=TEXT.vocab_size)
    tokens = engine.expected_text(Work(prompt, trace_length=length), cap)
    text = TEXT.decode([*prompt, *tokens]).removeprefix(TEXT.decode(prompt))
    return text, len(tokens)


def test_completion_of_a_string(client: openai.OpenAI) -> None:
    prompt = TEXT.encode("The water comes down")
    answer = client.completions.create(model="demo", prompt="The water comes down", max_tokens=64)
    text, tokens = expected(prompt, 64)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == ("length" if tokens == 64 else "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == tokens
    assert answer.usage.total_tokens == len(prompt) + tokens
    assert answer.object == "text_completion"
    assert answer.model == "demo"
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint


def test_default_cap_of_completions_is_openais(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="a", extra_body={"trace_output_tokens": 100}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_token_ids_strings_and_lists_agree(client: openai.OpenAI) -> None:
    words = ["one prompt", "another prompt"]
    ids = [TEXT.encode(word) for word in words]
    several = client.completions.create(model="demo", prompt=words, max_tokens=24)
    by_ids = client.completions.create(model="demo", prompt=ids, max_tokens=24)
    alone = [client.completions.create(model="demo", prompt=i, max_tokens=24) for i in ids]
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1]
    assert texts == [choice.text for choice in by_ids.choices]
    assert texts == [answer.choices[0].text for answer in alone]
    assert several.usage is not None
    assert several.usage.prompt_tokens == sum(map(len, ids))


def test_n_choices_count_the_prompt_once(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=["x y z", "u v w"], n=3, max_tokens=5, seed=1
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(TEXT.encode("x y z")) + len(TEXT.encode("u v w"))


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=40)
    stream = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.role for c in chunks[1:] if c.choices] == [None] * (len(chunks) - 2)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole.choices[0].finish_reason
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_stream_without_usage_says_nothing_of_it(server: Server) -> None:
    answer = server.post("/v1/completions", long_completion(5, stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "usage" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_streams_of_many_choices_are_whole(client: openai.OpenAI) -> None:
    prompts = [f"prompt number {number}" for number in range(8)]
    texts = [""] * 8
    for chunk in client.completions.create(
        model="demo", prompt=prompts, max_tokens=32, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [expected(TEXT.encode(prompt), 32)[0] for prompt in prompts]


async def test_concurrent_async_streams_do_not_mix(server: Server) -> None:
    prompts = [f"{number} bottles" for number in range(40)]

    async with server.async_client() as client:

        async def one(prompt: str) -> str:
            stream = await client.completions.create(
                model="demo", prompt=prompt, max_tokens=48, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(one, prompts))
    assert texts == [expected(TEXT.encode(prompt), 48)[0] for prompt in prompts]


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI, server: Server) -> None:
    body = {"trace_output_tokens": 60}
    whole = client.completions.create(model="demo", prompt="q", max_tokens=60, extra_body=body)
    text = whole.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = client.completions.create(
        model="demo", prompt="q", max_tokens=60, stop=[stop, "never this"], extra_body=body
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None
    assert 0 < cut.usage.completion_tokens < 60
    streamed = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="demo", prompt="q", max_tokens=60, stop=stop, stream=True, extra_body=body
        )
    )
    assert streamed == cut.choices[0].text
    assert server.stats()["open"] == 0


def test_stop_token_ids_are_not_text(client: openai.OpenAI) -> None:
    # The scripted engine does not stop at them, so the text just goes on without them.
    _, tokens = expected(TEXT.encode("q"), 10)
    prompt = TEXT.encode("q")
    engine = ScriptedEngine(Capabilities(8, 16, 1, 16, 16), vocab_size=TEXT.vocab_size)
    output = engine.expected_text(Work(prompt), 10)
    answer = client.completions.create(
        model="demo", prompt="q", max_tokens=10, extra_body={"stop_token_ids": [output[0]]}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens
    rest = [token for token in output if token != output[0]]
    assert answer.choices[0].text == TEXT.decode([*prompt, *rest]).removeprefix(TEXT.decode(prompt))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "penstock"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("absent/model")
    assert error.value.code == "model_not_found"


def test_request_id_comes_back(server: Server) -> None:
    body = {"model": "demo", "prompt": "x", "max_tokens": 2}
    answer = server.post("/v1/completions", body, {"x-request-id": "my-own.id"})
    assert answer.headers["x-request-id"] == "my-own.id"
    bad = server.post("/v1/completions", body, {"x-request-id": "no spaces"})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "x-request-id"


def test_token_ids_are_those_of_the_text(client: openai.OpenAI) -> None:
    prompt = "The water comes down"
    options = {"model": "demo", "prompt": prompt, "max_tokens": 40}
    asked = {**options, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**asked)
    choice = whole.choices[0].model_dump()
    assert choice["prompt_token_ids"] == TEXT.encode(prompt)
    assert whole.usage is not None
    assert len(choice["token_ids"]) == whole.usage.completion_tokens
    context = TEXT.decode(choice["prompt_token_ids"])
    text = TEXT.decode([*choice["prompt_token_ids"], *choice["token_ids"]])
    assert text.removeprefix(context) == choice["text"]
    chunks = [c.choices[0].model_dump() for c in client.completions.create(**asked, stream=True)]
    assert [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c] == [
        TEXT.encode(prompt)
    ]
    assert [i for c in chunks for i in c["token_ids"]] == choice["token_ids"]
    # Those that have come are those of the text that has come, unless a character is incomplete.
    ids, said = choice["prompt_token_ids"], ""
    for chunk in chunks[:-2]:
        ids, said = [*ids, *chunk["token_ids"]], said + chunk["text"]
        assert TEXT.decode(ids).removeprefix(context) == said
    assert "token_ids" not in client.completions.create(**options).choices[0].model_dump()
