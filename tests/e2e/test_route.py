"""The router between the official client and real servers of the included model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.router.harness import Router
from tests.server.harness import Server, wait_until

pytest.importorskip("torch", reason="the native engine needs torch")
# In bfloat16 a recomputed context may round otherwise, and turn a tie between two tokens.
FLAGS = ("--kv-tokens", "8192", "--threads", "1", "--dtype", "float32")
MESSAGES = [{"role": "user", "content": "What is a river?"}]
PROMPTS = ("Once upon a time", "The river", "Das Wasser fließt über", "日本の川は")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with Server(*FLAGS, engine="native") as one, Server(*FLAGS, engine="native") as other:
        yield [one, other]


@pytest.fixture(scope="module")
def router(servers: list[Server]) -> Iterator[Router]:
    flags = ("--slice-tokens", "8", "--place", "round-robin")
    with Router(*(server.url for server in servers), flags=flags) as router:
        yield router


def greedy(prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
    """A request whose answer is known, and as long as was asked for."""
    extra = {"ignore_eos": True, **more.pop("extra_body", {})}
    fields = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**fields, "extra_body": extra, **more}


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, str | None]:
    """Text and finish reason of a stream."""
    text, finish = "", None
    for chunk in client.completions.create(**options, stream=True):
        text += chunk.choices[0].text
        finish = chunk.choices[0].finish_reason or finish
    return text, finish


@pytest.mark.parametrize("prompt", PROMPTS)
def test_slices_make_the_text_of_one_whole_answer(
    servers: list[Server], router: Router, prompt: str
) -> None:
    with servers[0].client() as direct, router.client() as client:
        whole = direct.completions.create(**greedy(prompt, 40))
        sliced = client.completions.create(**greedy(prompt, 40))
        assert sliced.choices[0].text == whole.choices[0].text
        assert sliced.choices[0].finish_reason == "length"
        assert sliced.usage == whole.usage
        assert streamed(client, **greedy(prompt, 40)) == (whole.choices[0].text, "length")


def test_slices_went_to_both(router: Router) -> None:
    with router.client() as client:
        before = router.metric("router_slices_total")
        client.completions.create(**greedy("The river", 40))
    wait_until(lambda: router.metric("router_slices_total") == before + 5, 3)
    text = router.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("penstock:router_slices_total")]
    assert len(lines) == 2
    assert all('outcome="ok"' in line for line in lines)


def test_token_id_prompt_and_usage_in_the_stream(servers: list[Server], router: Router) -> None:
    ids = list(range(300, 320))
    options = greedy(ids, 30, stream=True, stream_options={"include_usage": True})
    with servers[0].client() as direct, router.client() as client:
        whole = list(direct.completions.create(**options))
        sliced = list(client.completions.create(**options))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices) for chunks in (whole, sliced)]
    assert texts[0] == texts[1]
    assert sliced[-1].usage == whole[-1].usage


def test_an_end_by_the_model_ends_it(servers: list[Server], router: Router) -> None:
    asked = greedy("Once upon a time", 40, extra_body={"return_token_ids": True})
    with servers[0].client() as direct, router.client() as client:
        ids = direct.completions.create(**asked).choices[0].model_dump()["token_ids"]
        options = greedy("Once upon a time", 40, extra_body={"stop_token_ids": [ids[30]]})
        whole = direct.completions.create(**options)
        sliced = client.completions.create(**options)
    assert sliced.choices[0].text == whole.choices[0].text
    assert sliced.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert sliced.usage == whole.usage


def test_stop_strings_across_a_slice_boundary(servers: list[Server], router: Router) -> None:
    with servers[0].client() as direct, router.client() as client:
        text = direct.completions.create(**greedy("The river", 40)).choices[0].text
        for begin in range(20, 60, 7):  # some of these windows straddle a boundary
            options = greedy("The river", 40, stop=[text[begin : begin + 12]])
            whole = direct.completions.create(**options).choices[0]
            assert streamed(client, **options) == (whole.text, "stop")


def test_chat_goes_whole(servers: list[Server], router: Router) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "temperature": 0}
    with servers[0].client() as direct, router.client() as client:
        whole = direct.chat.completions.create(**options, max_tokens=24)
        sent_on = client.chat.completions.create(**options, max_tokens=24)
        stream = client.chat.completions.create(**options, max_tokens=24, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert sent_on.choices[0].message.content == whole.choices[0].message.content == text


def test_many_at_once_are_each_their_own(servers: list[Server], router: Router) -> None:
    prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(2)]
    with servers[1].client() as direct, router.client() as client, ThreadPoolExecutor(8) as pool:
        wholes = [direct.completions.create(**greedy(p, 20)).choices[0].text for p in prompts]
        sliced = list(pool.map(lambda p: streamed(client, **greedy(p, 20))[0], prompts))
    assert sliced == wholes
    wait_until(lambda: router.metric("router_outstanding") == 0, 3)


def test_a_killed_backend_is_not_noticed_by_the_client(servers: list[Server]) -> None:
    """Last here, because the servers are everybody's."""
    doomed, left = servers[1], servers[0]
    options = greedy("Once upon a time", 100)
    with left.client() as direct:
        whole = direct.completions.create(**options).choices[0].text
    flags = ("--slice-tokens", "64", "--failures", "1")
    with Router(doomed.url, left.url, flags=flags) as router, router.client() as client:
        text = ""
        for number, chunk in enumerate(client.completions.create(**options, stream=True)):
            text += chunk.choices[0].text
            if number == 20:  # with nobody else here, ties go to the first one
                os.kill(doomed.pid, signal.SIGKILL)
        assert text == whole
        assert router.metric("router_retries_total") >= 1
        down = f'penstock:router_circuit{{backend="{doomed.url}",state="closed"}} 0.0'
        assert down in router.get("/metrics").text
        again = client.completions.create(**greedy("Once upon a time", 20))
        assert whole.startswith(again.choices[0].text)
    doomed.stop()
    doomed.status = 0  # it was killed by this test
