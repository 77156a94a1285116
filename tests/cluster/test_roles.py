"""Prefill and decode instances behind a front, by hand: hand-offs, losses, and what is refused."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import random
import sys
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.front import MOST_LOSSES
from penstock.cluster.machines import room_for
from penstock.config import ConfigError
from penstock.core.types import FinishReason, Role
from penstock.server.backend import check
from penstock.server.messages import Cancel
from penstock.settings import ClusterConfig, Config
from tests.cluster.fakes import Hall
from tests.cluster.test_front import finish

ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)


def test_a_request_is_prefilled_here_and_decoded_there() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES)
        for number in (0, 1):
            hall.start(number)
        work = hall.ask("r", 12, range(20), trace=10)
        once = hall.ask("once", 1, range(5))
        await finish(hall)
        hall.check_all({"r": (work, 12), "once": (once, 1)})
        adds = [(number, add.id, add.computed, add.cap, add.keep_kv) for number, add in hall.adds()]
        assert adds == [
            (0, "r", 0, 1, True),
            (0, "once", 0, 1, False),
            (1, "r~1", 20, 12, False),
        ]
        (size,) = hall.client.hand_offs
        assert size > 20
        assert hall.front._parcels == {}

    asyncio.run(story())


def test_kv_goes_ahead_chunk_by_chunk() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES, stream_kv=True)
        for number in (0, 1, 2):
            hall.start(number)
        work = hall.ask("r", 12, range(70), trace=10)
        while len(hall.ahead) < 2:
            await asyncio.sleep(0.001)
            hall.turn(0)
        assert not hall.client.tokens, "its prefill goes on"
        (to,) = {number for number, _ in hall.ahead}
        await finish(hall)
        hall.check_all({"r": (work, 12)})
        assert hall.adds()[-1][0] == to
        # Three chunks of at most 32 tokens, the last with the end.
        assert (len(hall.ahead), hall.parts) == (2, {"r~1": 3})
        assert hall.front._parcels == {}

    asyncio.run(story())


def test_kv_that_went_ahead_for_one_who_left_is_let_go() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES, stream_kv=True)
        for number in (0, 1):
            hall.start(number)
        hall.ask("r", 12, range(70), trace=10)
        while not hall.ahead:
            await asyncio.sleep(0.001)
            hall.turn(0)
        assert hall.front._parcels
        hall.front.send(Cancel("r", FinishReason.CANCELLED))
        assert hall.front._parcels == {}
        await finish(hall)
        assert hall.front._parcels == {}
        hall.check_all({})

    asyncio.run(story())


def test_kv_that_went_ahead_to_a_dead_instance_goes_to_another() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES, stream_kv=True)
        for number in (0, 1, 2):
            hall.start(number)
        work = hall.ask("r", 12, range(70), trace=10)
        while not hall.ahead:
            await asyncio.sleep(0.001)
            hall.turn(0)
        dead = hall.ahead[0][0]
        hall.kill(dead)
        await finish(hall)
        hall.check_all({"r": (work, 12)})
        assert [number for number, _ in hall.adds()] == [0, 3 - dead]
        assert hall.parts == {"r~1": 3}

    asyncio.run(story())


def test_kv_that_does_not_arrive_is_computed_again() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES)
        hall.loses_kv = 2
        for number in (0, 1):
            hall.start(number)
        work = hall.ask("r", 12, range(20), trace=10)
        await finish(hall)
        hall.check_all({"r": (work, 12)})
        assert [number for number, _ in hall.adds()] == [0, 1, 0, 1, 0, 1]
        # Each prefill computes the tokens that it has by then, and adds one.
        assert [len(add.generated) for _, add in hall.adds()] == [0, 1, 1, 2, 2, 3]

    asyncio.run(story())


@pytest.mark.parametrize("left", [0, 1])
def test_kv_of_which_a_part_is_lost_is_computed_again(left: int) -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES, stream_kv=True)
        for number in (0, 1):
            hall.start(number)
        work = hall.ask("r", 12, range(70), trace=10)
        while len(hall.ahead) < 2:
            await asyncio.sleep(0.001)
            hall.turn(0)
        del hall.front._parcels["r"][left:]
        await finish(hall)
        hall.check_all({"r": (work, 12)})
        assert [number for number, _ in hall.adds()] == [0, 1, 0, 1]
        assert not any(books.unseen for books in hall.front._books.values())

    asyncio.run(story())


def test_who_leaves_while_its_kv_is_fetched_is_not_waited_for() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES)
        hall.loses_kv = 1
        for number in (0, 1):
            hall.start(number)
        hall.ask("r", 12, range(20), trace=10)
        while len(hall.adds()) < 2:
            await asyncio.sleep(0.001)
            hall.turn(0)
        hall.front.send(Cancel("r", FinishReason.CANCELLED))
        hall.turn(1)
        assert hall.front._books[1].unseen == deque()
        assert hall.client.ends == {}
        hall.check_all({})

    asyncio.run(story())


async def until_decode(hall: Hall) -> None:
    """The request is prefilled, again if need be, and sent to the decode instance."""
    hall.sent.clear()
    for _ in range(1000):
        if hall.client.ends or any(number == 1 for number, _ in hall.adds()):
            return
        await asyncio.sleep(0.001)
        while hall.turn(0):
            pass
    raise AssertionError(hall.sent)


def test_what_kills_decode_instances_ends() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES)
        hall.start(0)
        hall.ask("poison", prompt=range(20), trace=20)
        for _ in range(MOST_LOSSES):
            assert hall.client.ends == {}
            hall.start(1)
            await until_decode(hall)
            hall.kill(1)
        end = hall.client.ends["poison"]
        assert end.reason is FinishReason.FAILED
        assert f"{MOST_LOSSES} instances" in end.detail

    asyncio.run(story())


def test_who_makes_progress_survives_any_number_of_decode_instances() -> None:
    async def story() -> None:
        hall = Hall("distserve", roles=ROLES)
        hall.start(0)
        work = hall.ask("r", 30, range(20), trace=25)
        for _ in range(MOST_LOSSES + 2):
            hall.start(1)
            await until_decode(hall)
            hall.turn(1)
            hall.turn(1)
            hall.kill(1)
        hall.start(1)
        await finish(hall)
        hall.check_all({"r": (work, 30)})

    asyncio.run(story())


@settings(max_examples=25, deadline=None)
@given(
    preset=st.sampled_from(["distserve", "kairos-literal", "kairos", "past-future"]),
    stream=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_texts_are_as_if_nothing_had_happened(preset: str, stream: bool, seed: int) -> None:
    """Random loads, deaths of either role, lost KV: every token once, and no memory in use."""

    async def story() -> None:
        draw = random.Random(seed)
        roles = (Role.PREFILL, Role.DECODE, Role.DECODE, Role.PREFILL)
        hall = Hall(preset, roles=roles, stream_kv=stream)
        for number in range(3):
            hall.start(number)
        works = {}
        for n in range(12):
            cap = draw.randint(1, 40)
            prompt = [draw.randrange(256) for _ in range(draw.randint(1, 90))]
            works[f"r{n}"] = (hall.ask(f"r{n}", cap, prompt), cap)
        for _ in range(60):
            await asyncio.sleep(0)
            hall.loses_kv = int(draw.random() < 0.1)
            for number in list(hall.live):
                if draw.random() < 0.8:
                    hall.turn(number)
            if draw.random() < 0.1 and hall.live:
                hall.kill(draw.choice(list(hall.live)))
            if draw.random() < 0.3:
                for number in {0, 1, 2, 3} - hall.live.keys():
                    hall.start(number)
        hall.loses_kv = 0
        for number in {0, 1, 2} - hall.live.keys():
            hall.start(number)
        await finish(hall)
        ends = hall.client.ends.values()
        failed = {end.id for end in ends if end.reason is FinishReason.FAILED}
        hall.check_all({name: work for name, work in works.items() if name not in failed})
        assert hall.front._parcels == {}

    asyncio.run(story())


@pytest.mark.parametrize(
    ("cluster", "preset", "message"),
    [
        ({"prefill": 2}, "kairos", "--prefill 2: it needs --decode of 1 or more"),
        ({"decode": 1}, "kairos", "--decode 1: it needs --prefill of 1 or more"),
        (
            {"prefill": 1, "decode": 2, "instances": 3},
            "kairos",
            "--instances 3: give it, or --prefill 1 --decode 2, not both",
        ),
        ({"prefill": 1, "decode": 1}, "scls", "--preset scls: slices go without roles"),
        ({"instances": 2, "kv_transport": "inline"}, "vllm", "--kv-transport inline: only"),
        ({"instances": 2, "stream_kv": True}, "vllm", "--stream-kv True: only"),
    ],
)
def test_what_does_not_go_together(cluster: dict[str, object], preset: str, message: str) -> None:
    config = Config.model_validate({"cluster": cluster, "scheduler": {"preset": preset}})
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize("engine", ["sim", "native"])
def test_a_direct_transport_needs_tensors_and_its_library(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"prefill": 1, "decode": 1, "kv_transport": "nixl"}
    config = Config.model_validate({"cluster": cluster, "engine": {"engine": engine}})
    monkeypatch.setitem(sys.modules, "nixl", None)
    message = {"sim": "not of sim", "native": r"install it with 'penstock\[nixl\]'"}[engine]
    with pytest.raises(ConfigError, match=f"--kv-transport nixl: .*{message}"):
        check(config)


def test_a_direct_transport_needs_a_ray_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"prefill": 1, "decode": 1, "kv_transport": "nixl"}
    config = Config.model_validate({"cluster": cluster})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.40.0")
    with pytest.raises(ConfigError, match=r"Ray is 2\.40\.0; it needs 2\.60"):
        check(config)


def test_machines_that_are_too_few_are_named_by_the_flags() -> None:
    with pytest.raises(ConfigError, match="--prefill 2 --decode 3: each needs 1 CPUs"):
        room_for(ClusterConfig(prefill=2, decode=3), [{"CPU": 4.0}])
