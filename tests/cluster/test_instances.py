"""Real instances as Ray actors, real clients, and kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from penstock.sim.recording import read_steps
from tests.server.harness import Server, wait_until

pytest.importorskip("ray")

STREAMS = 24


@pytest.fixture(scope="module")
def steps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each instance records its steps, with its number behind."""
    return tmp_path_factory.mktemp("steps") / "steps.jsonl"


@pytest.fixture(scope="module")
def cluster(steps_file: Path) -> Iterator[Server]:
    """Two instances that keep time; started once, since Ray takes its own."""
    flags = ("--instances", "2", "--cpus-per-instance", "0.5", "--trace-lengths")
    flags += ("--profile", "llama-2-7b/a100-80g", "--place", "round-robin")
    flags += ("--record-steps", str(steps_file))
    with Server(*flags, engine="sim") as server:
        wait_until(lambda: len(processes(server)) == 2, 30)
        yield server


def processes(server: Server) -> dict[int, int]:
    """The process of each instance that was ready last, as the log says."""
    found = {}
    for line in server.log.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            if entry["event"] == "instance_ready":
                found[entry["instance"]] = entry["pid"]
    return found


async def stream(client: openai.AsyncOpenAI, number: int) -> str:
    """The text of one stream: at several milliseconds a step it outlives three kills."""
    prompt = f"Story {number}: water flows down the pipe"
    answer = await client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"trace_output_tokens": 300 + number},
    )
    return "".join([chunk.choices[0].text async for chunk in answer])


async def kill(server: Server, number: int) -> int:
    """Kill an instance's process a little later; which one it was."""
    await asyncio.sleep(0.3)
    pid = processes(server)[number]
    os.kill(pid, signal.SIGKILL)
    return pid


async def back(server: Server, number: int, dead: int) -> None:
    """Wait until an instance has been replaced."""
    deadline = time.monotonic() + 40
    while processes(server)[number] == dead:
        assert time.monotonic() < deadline, "it was not replaced"
        await asyncio.sleep(0.1)


async def test_streams_survive_kill_9(cluster: Server) -> None:
    async with cluster.async_client() as client:
        tasks = [asyncio.create_task(stream(client, number)) for number in range(STREAMS)]
        first = await kill(cluster, 0)
        second = await kill(cluster, 1)
        assert not any(task.done() for task in tasks)
        wait_until(lambda: cluster.get("/ready").status_code == 503, 5)
        await back(cluster, 0, first)
        third = await kill(cluster, 0)
        assert not any(task.done() for task in tasks)
        await back(cluster, 1, second)
        disturbed = await asyncio.gather(*tasks)
        await back(cluster, 0, third)
        undisturbed = await asyncio.gather(*[stream(client, n) for n in range(len(disturbed))])
    assert all(disturbed)
    assert disturbed == undisturbed
    assert cluster.metric("instance_restarts_total") == 3
    assert cluster.metric("engine_restarts_total") == 3
    wait_until(lambda: cluster.stats()["kv_usage"] == 0)
    assert cluster.stats()["open"] == cluster.stats()["running"] == cluster.stats()["waiting"] == 0


def test_each_instance_records_its_own_steps(cluster: Server, steps_file: Path) -> None:
    with cluster.client() as client:
        for _ in range(2):
            client.completions.create(model="demo", prompt="Two pipes", max_tokens=3)
    assert all(read_steps(Path(f"{steps_file}.{number}")) for number in (0, 1))


def test_a_fleet_of_one_needs_no_ray() -> None:
    """Slices over one engine process; when that dies its streams wait and go on."""
    flags = ("--preset", "scls", "--parameters.slice_tokens", "20", "--parameters.interval", "0.05")
    with Server("--trace-lengths", *flags) as server, server.client() as client:
        answer = client.completions.create(
            model="demo",
            prompt="One pipe",
            max_tokens=200,
            stream=True,
            extra_body={"trace_output_tokens": 150},
        )
        pieces = []
        for number, chunk in enumerate(answer):
            pieces.append(chunk.choices[0].text)
            if number == 30:
                os.kill(server.engine_pid, signal.SIGKILL)
        whole = client.completions.create(
            model="demo",
            prompt="One pipe",
            max_tokens=200,
            extra_body={"trace_output_tokens": 150},
        )
        assert "".join(pieces) == whole.choices[0].text
        assert server.metric("instance_restarts_total") == 1
        assert server.metric("instance_load_seconds") == 0
