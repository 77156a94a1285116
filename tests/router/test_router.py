"""The router before backends that are slow, refuse, break or lie."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from penstock.config import ConfigError
from penstock.router.backend import open_session
from penstock.router.serve import inspect, make_backends
from penstock.router.settings import ROUTER_PLACES
from tests.router.fakes import DEFAULTS, Fake, Fault, Routed, routed, said, until


async def events(router: Routed, tokens: int, **more: Any) -> list[dict[str, Any]]:
    """What a stream says, without its [DONE]."""
    body = {"model": "fake", "prompt": " w1", "max_tokens": tokens, "stream": True, **more}
    async with router.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        lines = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def joined(found: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in found for choice in event.get("choices", ()))


BOTH, NONE, FIRST, SECOND = (True, True), (False, False), (True, False), (False, True)


@pytest.mark.parametrize(
    ("place", "ids"),
    [
        *((place, FIRST) for place in ROUTER_PLACES),
        *(("round-robin", i) for i in (BOTH, NONE, SECOND)),
    ],
)
async def test_slices_join_over_backends(place: str, ids: tuple[bool, bool]) -> None:
    one, other = (Fake(ids=able) for able in ids)
    async with routed(one, other, place=place) as router:
        answer = await router.post(17)
        assert answer.json()["choices"][0]["text"] == said(2, 18)
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert answer.json()["usage"] == {
            "prompt_tokens": 1,
            "completion_tokens": 17,
            "total_tokens": 18,
        }
        found = await events(router, 17, stream_options={"include_usage": True})
        assert joined(found) == said(2, 18)
        assert found[-1]["usage"]["completion_tokens"] == 17
        sizes = [body["max_tokens"] for body in (*one.bodies, *other.bodies)]
        assert sorted(sizes) == [2, 2, 5, 5, 5, 5, 5, 5]
        await until(lambda: router.service.open == 0)
        assert router.metric("slices_total") == 8
        assert router.metric("output_tokens_total") == 34
        ok = 'penstock:router_requests_total{route="/v1/completions",status="200"} 2.0'
        assert ok in router.service.pool.exposition().decode()


async def test_ids_are_continued_as_ids_and_text_as_text() -> None:
    exact, plain = Fake(), Fake(ids=False)
    async with routed(exact) as router:
        await router.text(7)
        assert [body["prompt"] for body in exact.bodies] == [" w1", [1, 2, 3, 4, 5, 6]]
    async with routed(plain) as router:
        await router.text(7)
        assert [body["prompt"] for body in plain.bodies] == [" w1", said(1, 6)]
        refused = await router.post(7, [1])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompt"
        assert plain.url in refused.json()["error"]["message"]


async def test_a_list_of_ids_is_a_prompt() -> None:
    async with routed(Fake(), Fake()) as router:
        assert await router.text(12, [7, 8, 9]) == said(10, 21)


@pytest.mark.parametrize("slice_tokens", [1, 2, 4, 7])
async def test_a_character_in_parts_is_neither_lost_nor_doubled(slice_tokens: int) -> None:
    fake = Fake(halves=True)
    async with routed(fake, Fake(halves=True), slice_tokens=slice_tokens) as router:
        answer = await router.post(17, [3])
        # Tokens 4 to 20; 19 and 20 are the beginning of a character that does not end.
        assert answer.json()["choices"][0]["text"] == " w6 w9 w12 w15 w18\ufffd"
        assert answer.json()["usage"]["completion_tokens"] == 17


async def test_the_end_of_the_model_is_the_end() -> None:
    async with routed(Fake(last=9)) as router:
        answer = await router.post(100)
        assert answer.json()["choices"][0]["text"] == said(2, 9)
        assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", ["w5", "6 w7", " w7 w8 w9", ["nowhere", "w6 w7"]])
async def test_stop_strings_are_found_in_the_joined_text(stop: Any) -> None:
    fake = Fake()
    async with routed(fake) as router:
        text = said(2, 40)
        end = min(text.find(one) for one in ([stop] if isinstance(stop, str) else [stop[1]]))
        answer = await router.post(39, stop=stop)
        assert answer.json()["choices"][0]["text"] == text[:end]
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert joined(await events(router, 39, stop=stop)) == text[:end]
        assert all("stop" not in body for body in fake.bodies)


async def test_other_fields_pass_untouched_and_counts_go_on() -> None:
    fake = Fake()
    async with routed(fake) as router:
        await router.text(12, temperature=0.3, logit_bias={"5": 1}, min_tokens=7, seed=40)
        assert all(body["temperature"] == 0.3 for body in fake.bodies)
        assert all(body["logit_bias"] == {"5": 1} for body in fake.bodies)
        assert [body["min_tokens"] for body in fake.bodies] == [7, 2, 0]
        assert [body["seed"] for body in fake.bodies] == [40, 45, 50]


async def test_headers_that_backends_need_are_passed() -> None:
    fake = Fake()
    async with routed(fake) as router:
        router.client.headers.update(
            {"authorization": "Bearer k", "x-slo-class": "c", "cookie": "s=1"}
        )
        await router.text(3)
        assert fake.headers[0]["authorization"] == "Bearer k"
        assert fake.headers[0]["x-slo-class"] == "c"
        assert "cookie" not in fake.headers[0]


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("slice_tokens", [0, 5])
async def test_a_broken_stream_goes_on_elsewhere(ids: bool, slice_tokens: int) -> None:
    one, other = Fake(ids=ids), Fake(ids=ids)
    async with routed(one, other, slice_tokens=slice_tokens) as router:
        one.faults += [Fault(after=3), Fault(after=0)]
        other.faults += [Fault(after=2)]
        assert joined(await events(router, 17)) == said(2, 18)
        assert router.metric("retries_total") >= 2


async def test_silence_is_a_failure() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, gap_timeout=0.3) as router:
        one.faults += [Fault(after=2, status=-1)]
        assert await router.text(12) == said(2, 13)
        assert 'outcome="silent"' in router.service.pool.exposition().decode()


@pytest.mark.parametrize("status", [307, 500, 503])
async def test_who_always_fails_is_left_alone_until_it_works(status: int) -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, failures=2, backoff=0.3) as router:
        one.always = Fault(status=status)
        for _ in range(12):
            assert await router.text(5) == said(2, 6)
            await asyncio.sleep(0.02)
        await until(lambda: router.service.pool.open_backends == 1)
        one.always = None
        await until(lambda: router.service.pool.open_backends == 2)
        one.forget()
        await router.text(5)
        assert one.bodies


async def test_a_circuit_that_opens_moves_running_slices() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, failures=1, place="round-robin", slice_tokens=50) as router:
        one.pace = 0.05
        running = asyncio.create_task(router.text(30))
        await until(lambda: len(one.bodies) == 1)
        assert await router.text(5) == said(2, 6)  # at the other one
        await asyncio.sleep(0.2)
        one.faults += [Fault(status=500)]
        assert await router.text(5) == said(2, 6)
        assert await asyncio.wait_for(running, 1) == said(2, 31)
        assert other.bodies[-1]["prompt"][:3] == [1, 2, 3] or other.bodies[-2]["prompt"] != " w1"


async def test_busy_backends_are_asked_again_when_they_said() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, place="round-robin") as router:
        one.faults += [Fault(status=429, headers={"retry-after": "1"})]
        for _ in range(4):
            assert await router.text(5) == said(2, 6)
        assert len(one.bodies) == 1
        assert router.service.pool.open_backends == 2  # no failure
        await asyncio.sleep(1.0)
        await router.text(10)
        assert len(one.bodies) == 2


async def test_when_all_are_busy_the_client_hears_it_at_once() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, max_wait=20) as router:
        for fake, wait in ((one, "7"), (other, "9")):
            body = {"error": {"message": f"full for {wait}"}}
            fake.always = Fault(status=429, headers={"retry-after": wait}, body=body)
        async with asyncio.timeout(5):
            for _ in range(2):
                answer = await router.post(5)
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "7"
                assert "full for 7" in answer.json()["error"]["message"]
                assert "full for 9" in answer.json()["error"]["message"]
        assert len(one.bodies) == len(other.bodies) == 1


async def test_who_has_begun_waits_for_the_busy() -> None:
    one = Fake()
    async with routed(one, max_wait=1.0, retries=0) as router:
        busy = Fault(status=429, headers={"retry-after": "0.2"})
        one.faults += [Fault(after=99), busy, busy, busy]
        assert joined(await events(router, 12)) == said(2, 13)
        one.faults += [Fault(after=99), *[busy] * 99]
        found = await events(router, 12)
        assert joined(found) == said(2, 6)
        assert found[-1]["error"]["code"] == "no_backend"


async def test_when_nobody_is_left_the_client_hears_why() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, failures=2, retries=2, backoff=0.05, max_backoff=60) as router:
        one.always = other.always = Fault(status=500, body={"error": {"message": "out of luck"}})
        answer = await router.post(5)
        assert answer.status_code == 502
        assert "out of luck" in answer.json()["error"]["message"]
        while router.service.pool.open_backends:
            await router.post(5)
        answer = await router.post(5)
        assert answer.status_code == 503
        assert one.url in answer.json()["error"]["message"]
        assert other.url in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert (await router.client.get("/ready")).status_code == 503
        assert (await router.client.get("/health")).status_code == 200


async def test_an_error_in_the_stream_keeps_what_came_before() -> None:
    one = Fake()
    async with routed(one, retries=0) as router:
        one.faults += [Fault(after=3)]
        found = await events(router, 17)
        assert joined(found) == said(2, 4)
        assert found[-1]["error"]["code"] == "backend_failed"
        assert one.url in found[-1]["error"]["message"]


async def test_a_backend_that_is_gone_and_comes_back() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, failures=1) as router:
        await one.stop()
        assert await router.text(12) == said(2, 13)
        assert router.service.pool.open_backends == 1
        await one.start()
        await until(lambda: router.service.pool.open_backends == 2)


async def test_a_stream_outlives_the_only_backend() -> None:
    only = Fake()
    async with routed(only, failures=1, max_wait=10) as router:
        only.pace = 0.02
        stream = asyncio.create_task(events(router, 30))
        await until(lambda: len(only.bodies) == 2)
        await only.stop()
        await until(lambda: router.service.pool.open_backends == 0)
        refused = await router.post(3)  # nobody begins anew meanwhile
        assert refused.status_code == 503
        await only.start()
        assert joined(await stream) == said(2, 31)


async def test_a_backend_that_comes_back_with_another_model_stays_out() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other, failures=1) as router:
        one.faults += [Fault(status=500)]
        one.model = "else"
        await router.text(5)
        await asyncio.sleep(0.4)
        assert router.service.pool.open_backends == 1
        assert "else" in router.service.pool.backends[0].complaint


async def test_the_clients_own_mistakes_are_its_to_hear() -> None:
    one, other = Fake(), Fake()
    async with routed(one, other) as router:
        body = {"error": {"message": "bad", "type": "t", "param": "top_k", "code": "c"}}
        one.faults += [Fault(status=400, body=body)]
        answer = await router.post(5, top_k=-7)
        assert answer.status_code == 400
        assert answer.json() == body
        assert not other.bodies
        assert router.service.pool.backends[0].circuit.failures == 0


async def test_a_client_that_leaves_frees_its_backend() -> None:
    one = Fake()
    async with routed(one, slice_tokens=0) as router:
        one.pace = 0.05
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await router.text(1000)
        await until(lambda: one.left == 1)
        assert 'status="499"' in router.service.pool.exposition().decode()
        await until(lambda: router.metric("outstanding") == 0)


async def test_the_backends_context_ends_an_answer() -> None:
    fake = Fake(context=13)
    async with routed(fake) as router:
        answer = await router.post(100, [1, 2])
        assert answer.json()["choices"][0]["text"] == said(3, 13)
        assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_chat_is_passed_on_as_it_comes() -> None:
    one, other = Fake(), Fake()
    body = {"model": "fake", "messages": [], "stream": True}
    async with routed(one, other) as router:
        one.faults += [Fault(status=500)]
        answer = await router.client.post("/v1/chat/completions", json=body)
        assert [f"c{n}" in answer.text for n in range(4)] == [True] * 4
        assert other.bodies == [body]
        one.faults += [Fault(after=2)]
        other.faults += [Fault(after=2)]
        answer = await router.client.post("/v1/chat/completions", json=body)
        assert answer.text.count("c0") == 1
        assert "backend_failed" in answer.text
        assert "[DONE]" not in answer.text


async def test_what_cannot_be_continued_goes_whole_or_is_refused() -> None:
    fake = Fake()
    async with routed(fake) as router:
        assert await router.text(5, n=2) == "whole"
        assert fake.bodies == [{"model": "fake", "prompt": " w1", "max_tokens": 5, "n": 2}]
        answer = await router.post(6, n=2)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "n"
        assert "5" in answer.json()["error"]["message"]
        assert len(fake.bodies) == 1


async def test_models_and_draining() -> None:
    async with routed(Fake()) as router:
        assert (await router.client.get("/v1/models")).json()["data"][0]["id"] == "fake"
        assert (await router.client.get("/v1/models/fake")).status_code == 200
        assert (await router.client.get("/v1/models/none")).status_code == 404
        assert (await router.client.get("/v1/models/made/up")).status_code == 404
        refused = 'router_requests_total{route="/v1/models/{model}",status="404"} 2.0'
        assert refused in router.service.pool.exposition().decode()
        router.service.draining = True
        answer = await router.post(3)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert (await router.client.get("/ready")).status_code == 503
        router.service.draining = False


async def test_backends_of_different_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--backend \S+ serves b, but --backend \S+ serves a"):
        async with routed(Fake(model="a"), Fake(model="b")):
            pass


async def test_a_backend_that_cannot_be_used_is_refused() -> None:
    settings = replace(DEFAULTS, backend=("http://127.0.0.1:9",))
    async with open_session(1.0) as session:
        with pytest.raises(ConfigError, match=r"--backend http://127.0.0.1:9 cannot be used"):
            await inspect(make_backends(settings, session), 0.1)
    fake = Fake()
    fake.always = Fault(status=401, body={"error": {"message": "a key is needed"}})
    with pytest.raises(ConfigError, match="a key is needed"):
        async with routed(fake):
            pass
