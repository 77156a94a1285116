"""How long a router waits for backends, how often it asks them again, and what they may say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.router.backend import Backend
from penstock.router.failures import BackendError, Kind
from tests.router.fakes import Fake, Fault, routed, said, until

CHAT = {"model": "fake", "messages": []}


async def test_an_answer_that_comes_whole_may_take_its_time() -> None:
    one = Fake()
    async with routed(one, gap_timeout=0.2) as router:
        one.pace = 0.6
        answer = await router.client.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == "whole"
        assert len(one.bodies) == 1
        assert router.service.pool.backends[0].circuit.failures == 0


async def test_a_backend_that_hangs_while_it_owes_a_whole_answer() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, gap_timeout=0.3, place="round-robin") as router:
        one.answers.clear()
        async with asyncio.timeout(5):
            for _ in range(2):
                answer = await router.client.post("/v1/chat/completions", json=CHAT)
                assert answer.json()["choices"][0]["message"]["content"] == "whole"
        one.answers.set()
        assert one.bodies, "it was asked first"
        assert 'outcome="silent"' in router.service.pool.exposition().decode()


@pytest.mark.parametrize("kind", [Kind.CONNECTION, Kind.ERROR, Kind.CUT])
async def test_who_refuses_connections_may_still_finish_what_it_has(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a server that is shutting down."""
    asked: list[str] = []

    async def models(backend: Backend) -> list[dict[str, Any]]:
        asked.append(backend.url)
        raise BackendError(kind, backend.url, "not now")

    one = Fake()
    async with routed(one, gap_timeout=0.1) as router:
        one.pace = 0.6
        monkeypatch.setattr(Backend, "models", models)
        answers = await asyncio.gather(
            *(router.client.post("/v1/chat/completions", json=CHAT) for _ in range(10))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert 2 <= len(asked) <= 7, "not one watch for all"
        assert router.service.pool.backends[0].circuit.failures == 0
        count = len(asked)
        await asyncio.sleep(0.3)
        assert len(asked) == count, "it is asked although it owes nothing"


async def test_a_stream_without_a_byte_is_tried_elsewhere() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, retries=1) as router:
        one.faults += [Fault(status=200, body=b"")]
        answer = await router.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert "c3" in answer.text
        one.always = other.always = Fault(status=200, body=b"")
        answer = await router.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert answer.status_code == 502
        assert "without" in answer.json()["error"]["message"]


async def test_who_is_busy_for_no_time_is_not_asked_without_end() -> None:
    one = Fake()
    async with routed(one, max_wait=0.5) as router:
        one.pace = 0.02
        running = asyncio.create_task(router.post(12))
        await until(lambda: len(one.bodies) == 1)
        one.always = Fault(status=429, headers={"retry-after": "0"})
        async with asyncio.timeout(5):
            answer = await running
        assert answer.json()["error"]["code"] == "no_backend"
        assert len(one.bodies) <= 8
        assert (await router.post(5)).status_code == 429


async def test_who_takes_long_to_say_busy_is_not_asked_without_end() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, max_wait=0.5) as router:
        one.always = other.always = Fault(status=429, headers={"retry-after": "0.1"}, delay=0.3)
        async with asyncio.timeout(5):
            answer = await router.post(5)
        assert answer.json()["error"]["code"] == "no_backend"
        assert len(one.bodies) == len(other.bodies) == 1


async def test_without_any_wait_the_next_one_is_asked() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, max_wait=0.0) as router:
        one.faults += [Fault(status=429)]
        assert await router.text(5) == said(2, 6)
        assert (len(one.bodies), len(other.bodies)) == (1, 1)


@pytest.mark.parametrize("failures", [1, 3])  # after one the circuit is open, or it only rests
async def test_time_at_a_backend_that_dies_is_no_wait(failures: int) -> None:
    one = Fake()
    async with routed(one, failures=failures, max_wait=0.4, slice_tokens=50) as router:
        one.pace = 0.05
        one.faults += [Fault(after=12)]
        assert await router.text(20) == said(2, 21)


async def test_a_failure_that_was_made_good_is_not_told() -> None:
    """The first slice failed once, the second finds every circuit open."""
    one, other = Fake(), Fake()
    async with routed(one, other, max_wait=0.4, slice_tokens=5, backoff=9.0) as router:
        one.faults += [Fault(after=2)]
        one.pace = other.pace = 0.05
        asking = asyncio.create_task(router.post(12))
        await until(lambda: len(one.bodies) + len(other.bodies) == 3)
        pool = router.service.pool
        for backend in pool.backends.values():
            while not backend.circuit.failure():
                pass
            pool._open(backend)
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend")


async def test_time_at_a_backend_whose_circuit_opens_is_no_wait() -> None:
    one = Fake()
    async with routed(one, failures=1, max_wait=0.4, slice_tokens=50) as router:
        one.pace = 0.05
        running = asyncio.create_task(router.text(30))
        await asyncio.sleep(0.6)
        one.faults += [Fault(status=500)]
        assert await router.text(3) == said(2, 4)
        assert await running == said(2, 31)


@pytest.mark.parametrize(
    "listing",
    [
        b'{"data": [{"id": "\xff"}]}',
        b'{"data": ' + b"[" * 100_000,
        b'{"data": [{"id": 5}]}',
        b'{"data": [{"id": ' + b"1" * 5000 + b"}]}",
        b'{"data": {"id": "fake"}}',
    ],
)
async def test_a_list_of_models_that_is_none_is_a_failed_probe(listing: bytes) -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, failures=1, backoff=0.05) as router:
        one.faults += [Fault(status=500, body={"error": {"message": "out of luck"}})]
        one.listing = listing
        assert await router.text(5) == said(2, 6)
        complaint = router.service.pool.backends[0]
        await until(lambda: "without models" in complaint.complaint)
        one.listing = None
        await until(lambda: router.service.pool.open_backends == 2)


async def test_a_probe_that_goes_wrong_here_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other, right = Fake(), Fake(), Backend.models

    async def wrong(self: Backend) -> list[dict[str, Any]]:
        monkeypatch.setattr(Backend, "models", right)
        raise ZeroDivisionError(self.url)

    async with routed(one, other, failures=1, backoff=0.05) as router:
        one.faults += [Fault(status=500)]
        monkeypatch.setattr(Backend, "models", wrong)
        assert await router.text(5) == said(2, 6)
        await until(lambda: router.service.pool.open_backends == 2)
        assert "ZeroDivisionError" in router.service.pool.backends[0].complaint


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices": [{"text": "\xff"}]}',
        b'{"error": {"message": ' + b"[" * 9000,
        b'{"choices": 5}',
    ],
)
async def test_an_event_that_is_none_is_the_backends_failure(event: bytes) -> None:
    one, other = Fake(), Fake()
    async with routed(one, other) as router:
        one.faults += [Fault(status=200, body=b"data: " + event + b"\n\n")]
        assert await router.text(12) == said(2, 13)
        assert 'outcome="error"' in router.service.pool.exposition().decode()


async def test_an_error_body_that_is_nested_too_deep_is_shown_as_it_is() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other) as router:
        one.faults += [Fault(status=500, body=b"[" * 100_000)]
        assert await router.text(5) == said(2, 6)
        assert "[[[" in router.service.pool.backends[0].complaint
