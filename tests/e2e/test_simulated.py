"""The server over the simulated engine: official client, HTTP, engine process, and no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import openai
import pytest

from penstock.cli import app
from penstock.core.forecast.latency.base import StepLoad
from penstock.sim import profiles
from tests.server.harness import Server, wait_until

PROFILE = "llama-2-7b/a100-80g"
SPEED = 0.5  # steps of about 20 ms are longer than what a busy machine adds to them
MESSAGES = [{"role": "user", "content": "What is a river?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    machine = ("--preset", "vllm", "--kv-tokens", "4096", "--trace-lengths")
    with Server("--profile", PROFILE, "--speed", str(SPEED), *machine, engine="sim") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_no_process_has_torch(server: Server) -> None:
    for pid in (server.pid, server.engine_pid):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_same_question_gets_the_same_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=24)
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=24, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text
    assert whole.choices[0].message.content == text


def test_tokens_come_at_the_pace_of_the_profile(client: openai.OpenAI) -> None:
    prompt, tokens = [300] * 100, 40
    stream = client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=tokens,
        stream=True,
        extra_body={"trace_output_tokens": tokens},
    )
    times = [time.perf_counter() for chunk in stream if chunk.choices[0].text]
    assert len(times) == tokens
    model = profiles.load(PROFILE)
    contexts = range(len(prompt) + 1, len(prompt) + tokens)
    steps = [model.seconds(StepLoad(1, n, longest=n)) / SPEED for n in contexts]
    gaps = [b - a for a, b in pairwise(times)]
    # Steps that follow each other end when the profile says, so delays do not add up.
    assert statistics.median(gaps) == pytest.approx(statistics.median(steps), rel=0.1)
    assert times[-1] - times[0] == pytest.approx(sum(steps), rel=0.1)


def test_memory_runs_out_and_requests_are_evicted_as_on_a_machine(server: Server) -> None:
    prompts = [[300 + i] * 300 for i in range(12)]

    def one(prompt: list[int]) -> openai.types.Completion:
        with server.client() as client:
            return client.completions.create(
                model="demo", prompt=prompt, max_tokens=100, extra_body={"trace_output_tokens": 100}
            )

    before = server.metric("num_preemptions_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(one, prompts))
    for answer in answers:
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 100
    assert server.metric("num_preemptions_total") > before  # 12 * 400 tokens, room for 4,096
    wait_until(lambda: server.stats()["kv_usage"] == 0, 3)


def test_a_profile_made_from_outside_is_the_one_inside(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    grid = ("--batches", "1,4", "--prompts", "64,256", "--joins", "32,128", "--repeats", "2")
    with pytest.raises(SystemExit) as left:
        app(["profile", str(out), "--url", server.url, *grid])
    assert left.value.code in {None, 0}
    found, truth = profiles.load(str(out)), profiles.load(PROFILE)
    for decoding, each in ((1, 100), (3, 200), (4, 300)):
        load = StepLoad(decoding, decoding * each, longest=each)
        assert found.seconds(load) == pytest.approx(truth.seconds(load) / SPEED, rel=0.1)
