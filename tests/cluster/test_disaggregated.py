"""Real prefill and decode instances, real clients, and kill -9."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.cluster.test_instances import back, kill, processes, stream
from tests.server.harness import Server, wait_until

pytest.importorskip("ray")

ROLES = ("--prefill", "1", "--decode", "2", "--cpus-per-instance", "0.4")
PROMPTS = [
    "Water flows down the pipe and",
    "A river is",
    "The word 'penstock' means " * 12,
    "In the beginning there was a valve, and then",
]


def answers(server: Server) -> list[str]:
    """Greedy texts, and one that needs no decode instance."""
    with server.client() as client:
        found = []
        for prompt in PROMPTS:
            stream = client.completions.create(
                model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True
            )
            found.append("".join(chunk.choices[0].text for chunk in stream))
        one = client.completions.create(
            model="demo", prompt=PROMPTS[0], max_tokens=1, temperature=0
        )
        return [*found, one.choices[0].text]


def long_answer(server: Server, kill_after: int | None = None) -> str:
    """A greedy text; every decode instance is killed after so many pieces of it."""
    with server.client() as client:
        answer = client.completions.create(
            model="demo", prompt=PROMPTS[1], max_tokens=400, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = []
        for number, chunk in enumerate(answer):
            pieces.append(chunk.choices[0].text)
            if number == kill_after:
                for instance in (1, 2):
                    os.kill(processes(server)[instance], signal.SIGKILL)
        return "".join(pieces)


@pytest.fixture(scope="module")
def expected() -> tuple[list[str], str]:
    """What one instance answers."""
    with Server("--dtype", "float32", engine="native") as server:
        return answers(server), long_answer(server)


@pytest.mark.parametrize("transport", ["object-store", "inline", "nixl"])
def test_texts_are_those_of_one_instance(expected: tuple[list[str], str], transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="NIXL has no wheel for this platform")
    expected_short, expected_long = expected
    flags = (*ROLES, "--dtype", "float32", "--threads", "1", "--preset", "kairos")
    # The longest prompt takes more than one step, so part of its KV goes ahead.
    flags += ("--stream-kv", "--max-step-tokens", "64", "--kv-transport", transport)
    with Server(*flags, engine="native") as server:
        wait_until(lambda: len(processes(server)) == 3, 120)
        assert answers(server) == expected_short
        assert server.metric("kv_hand_offs_total") == len(PROMPTS)
        assert server.metric("kv_hand_off_bytes_total") > 10_000
        assert server.metric("kv_hand_off_seconds_count") == len(PROMPTS)
        assert long_answer(server, kill_after=20) == expected_long
        assert server.metric("instance_restarts_total") == 2
        assert server.metric("kv_hand_offs_total") == len(PROMPTS) + 2
        wait_until(lambda: server.stats()["kv_usage"] == 0)


async def test_streams_survive_kill_9_of_either_role() -> None:
    flags = (*ROLES, "--trace-lengths", "--profile", "llama-2-7b/a100-80g")
    with Server(*flags, engine="sim") as server:
        wait_until(lambda: len(processes(server)) == 3, 90)
        async with server.async_client() as client:
            tasks = [asyncio.create_task(stream(client, number)) for number in range(16)]
            first = await kill(server, 1)
            assert not any(task.done() for task in tasks)
            second = await kill(server, 0)
            await back(server, 0, second)
            await back(server, 1, first)
            third = await kill(server, 2)
            assert not any(task.done() for task in tasks)
            disturbed = await asyncio.gather(*tasks)
            await back(server, 2, third)
            undisturbed = await asyncio.gather(*[stream(client, n) for n in range(len(tasks))])
        assert all(disturbed)
        assert disturbed == undisturbed
        assert server.metric("instance_restarts_total") == 3
        assert server.metric("kv_hand_offs_total") >= 2 * 16
        wait_until(lambda: server.stats()["kv_usage"] == 0)
        assert server.stats()["open"] == server.stats()["running"] == 0
