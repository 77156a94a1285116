"""The whole system: official client, HTTP, engine process, model."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from penstock.models import demo_path
from penstock.text import load_tokenizer
from tests.server.harness import Server, long_completion, wait_until

pytest.importorskip("torch", reason="the native engine needs torch")
TEXT = load_tokenizer(demo_path())
MESSAGES = [{"role": "user", "content": "What is a river?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The demo model on one thread, with little KV memory."""
    flags = ("--trace-lengths", "--kv-tokens", "4096", "--threads", "1", "--max-waiting", "100")
    with Server(*flags, engine="native") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_only_the_engine_process_has_torch(server: Server) -> None:
    assert "libtorch" in Path(f"/proc/{server.engine_pid}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()


def test_greedy_chat_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=24, temperature=0
    )
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=24, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text
    assert whole.choices[0].message.content == text


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    ended = answer.choices[0].finish_reason == "stop"  # by a token that is no text
    assert len(logprobs.content) == answer.usage.completion_tokens - ended > 0
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert entry.bytes == list(entry.token.encode())
        assert len(entry.top_logprobs) == 3
        # Greedy: the token is the most likely one, and the others follow in order.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
        falling = [top.logprob for top in entry.top_logprobs]
        assert falling == sorted(falling, reverse=True)
        assert sum(map(math.exp, falling)) <= 1 + 1e-5


def test_plain_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {"model": "demo", "prompt": "The river", "max_tokens": 9, "temperature": 0}
    whole = client.completions.create(**options, logprobs=2).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.tokens is not None
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.text_offset is not None
    assert whole.logprobs.top_logprobs is not None
    for token, offset in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
        assert whole.text.startswith(token, offset)
    assert all(1 <= len(top) <= 2 for top in whole.logprobs.top_logprobs)
    chunks = [
        chunk.choices[0] for chunk in client.completions.create(**options, logprobs=2, stream=True)
    ]
    tokens = [token for c in chunks if c.logprobs for token in c.logprobs.tokens or ()]
    offsets = [offset for c in chunks if c.logprobs for offset in c.logprobs.text_offset or ()]
    assert (tokens, offsets) == (whole.logprobs.tokens, whole.logprobs.text_offset)


@pytest.mark.parametrize("stop", ["ake ", " "])
def test_log_probabilities_of_a_text_that_is_cut_are_streamed_too(
    client: openai.OpenAI, stop: str
) -> None:
    options = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options, logprobs=1, stop=stop).choices[0]
    stream = client.completions.create(**options, logprobs=1, stop=stop, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert whole.logprobs is not None
    tokens = [token for c in chunks if c.logprobs for token in c.logprobs.tokens or ()]
    assert tokens == whole.logprobs.tokens


def test_offsets_count_the_characters_that_are_told(client: openai.OpenAI) -> None:
    """Tokens that are parts of characters, or no text at all, move nothing by themselves."""
    answer = client.completions.create(
        model="demo", prompt="世界", max_tokens=40, temperature=2, seed=3, logprobs=20
    ).choices[0]
    assert answer.logprobs is not None
    offsets, tops = answer.logprobs.text_offset, answer.logprobs.top_logprobs
    assert offsets is not None
    assert tops is not None
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(answer.text)
    for top in tops:
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(
            model="demo", prompt="Once upon a time", max_tokens=16, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    assert texts(5) == texts(5)
    assert len(set(texts(5))) == 3
    assert texts(5) != texts(60)


def test_logit_bias_and_stop_token(client: openai.OpenAI) -> None:
    comma = TEXT.encode(",", add_special_tokens=False)[0]
    forced = client.completions.create(
        model="demo", prompt="The river", max_tokens=4, logit_bias={str(comma): 100}
    )
    assert forced.choices[0].text == ",,,,"
    stopped = client.completions.create(
        model="demo",
        prompt="The river",
        max_tokens=4,
        logit_bias={str(comma): 100},
        extra_body={"stop_token_ids": [comma]},
    )
    assert stopped.choices[0].text == ""
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == 1


def test_end_of_sequence_is_no_text(client: openai.OpenAI) -> None:
    eos = TEXT.eos_ids[0]
    biased = {"model": "demo", "prompt": "The river", "logit_bias": {str(eos): 100}}
    ended = client.completions.create(**biased, max_tokens=4)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    ignored = client.completions.create(**biased, max_tokens=4, extra_body={"ignore_eos": True})
    assert ignored.choices[0].finish_reason == "length"
    assert ignored.usage is not None
    assert ignored.usage.completion_tokens == 4


def test_64_streams_of_which_a_third_leave(server: Server) -> None:
    chance = random.Random(7)
    plans = [(chance.randrange(20, 120), chance.random() < 1 / 3) for _ in range(64)]
    barrier = threading.Barrier(len(plans))
    before = server.metric("request_success_total")

    def one(tokens: int, leaves: bool) -> bool:
        seen = 0
        barrier.wait()
        with (
            httpx.Client(timeout=60) as http,
            http.stream(
                "POST", f"{server.url}/v1/completions", json=long_completion(tokens, stream=True)
            ) as answer,
        ):
            for line in answer.iter_lines():
                seen += line.startswith("data: {")
                if leaves and seen > tokens // 3:
                    return False
                if line == "data: [DONE]":
                    return True
        pytest.fail("a stream ended without [DONE]")

    with ThreadPoolExecutor(len(plans)) as pool:
        done = list(pool.map(lambda plan: one(*plan), plans))
    assert done == [not leaves for _, leaves in plans]
    wait_until(lambda: server.stats()["kv_usage"] == 0, 3)
    stats = server.stats()
    assert (stats["open"], stats["running"], stats["waiting"]) == (0, 0, 0)
    # A client may leave when the server has already made the rest of its answer.
    assert sum(done) <= server.metric("request_success_total") - before <= len(plans)
