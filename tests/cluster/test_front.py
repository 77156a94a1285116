"""The front: whole requests outside, slices inside, and instances that come and go."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.books import NOTHING
from penstock.cluster.front import MOST_LOSSES
from penstock.core.forecast.latency.affine import Affine
from penstock.core.policies.fleets import FLEETS
from penstock.core.sampling import SamplingParams
from penstock.core.types import FinishReason
from penstock.server.messages import NOTHING_SWAPPED, Cancel, Explain, Step, Swapped
from penstock.server.supervisor import EngineStartError
from tests.cluster.fakes import Hall

SCLS = {"slice_tokens": 4, "interval": 0.002}


async def dispatched() -> None:
    """The pool has been looked at, if it was due."""
    await asyncio.sleep(0.004)


async def finish(hall: Hall) -> None:
    """Turn all instances until nobody is left."""
    for _ in range(2000):
        await asyncio.sleep(0.0005)
        for number in list(hall.live):
            while hall.turn(number):
                pass
        if not hall.front._stories:
            return
    raise AssertionError(hall.front._stories)


async def test_a_whole_request_goes_to_one_instance() -> None:
    hall = Hall()
    hall.start(0)
    hall.start(1)
    works = {name: (hall.ask(name, prompt=(5, n)), 30) for n, name in enumerate("abcd")}
    await dispatched()
    assert sorted(number for number, _ in hall.adds()) == [0, 0, 1, 1]
    await finish(hall)
    hall.check_all(works)
    assert [add.id for _, add in hall.adds()] == list("abcd")


async def test_the_end_of_a_slice_is_not_the_end() -> None:
    hall = Hall("scls", **SCLS)
    hall.start(0)
    works = {"a": (hall.ask("a", cap=10, trace=10), 10)}
    await finish(hall)
    hall.check_all(works)
    adds = [add for _, add in hall.adds()]
    assert [add.id for add in adds] == ["a", "a~1", "a~2"]
    assert [add.cap for add in adds] == [4, 8, 10]
    assert [add.generated for add in adds] == [hall.client.tokens["a"][:n] for n in (0, 4, 8)]
    assert [add.batch for add in adds] == [1, 2, 3]


async def test_a_slice_longer_than_any_output_is_refused() -> None:
    with pytest.raises(EngineStartError, match="slice_tokens is 100000, but no output has more"):
        Hall("scls", slice_tokens=100_000).start(0)


async def test_a_lost_instance_is_no_loss() -> None:
    hall = Hall(place="round-robin")
    hall.start(0)
    hall.start(1)
    works = {name: (hall.ask(name, prompt=(7, n), trace=20), 30) for n, name in enumerate("abcd")}
    await dispatched()
    for _ in range(6):
        hall.turn(0)
        hall.turn(1)
    heard = {name: list(tokens) for name, tokens in hall.client.tokens.items()}
    assert all(heard.values())
    dead = hall.kill(0)
    moved = [add.id for number, add in hall.adds() if number == 0]
    await dispatched()
    again = hall.adds()[4:]
    assert [(number, add.id) for number, add in again] == [(1, f"{name}~1") for name in moved]
    assert [add.generated for _, add in again] == [heard[name] for name in moved]
    # What the dead one might still say is not listened to.
    dead.loop.turn()
    hall.front.instance_said(0, dead.pipe.events.popleft())
    assert {name: hall.client.tokens[name] for name in works} == heard
    await finish(hall)
    hall.check_all(works)
    assert hall.client.lost == [(0, 1)]


async def test_without_instances_requests_wait_and_go_on() -> None:
    hall = Hall()
    hall.start(0)
    works = {"a": (hall.ask("a", trace=12), 30)}
    await dispatched()
    for _ in range(5):
        hall.turn(0)
    hall.kill(0)
    assert not hall.front.ready
    assert hall.client.gauges is not None
    assert (hall.client.gauges.running, hall.client.gauges.waiting) == (0, 1)
    assert hall.client.ends == {}
    await dispatched()
    hall.front.send(Explain(3, "a"))
    assert "pool" in hall.client.explained[3]
    assert "once an instance is up" in hall.client.explained[3]
    hall.start(0)
    assert hall.front.ready
    await finish(hall)
    hall.check_all(works)


async def test_what_kills_instances_ends() -> None:
    hall = Hall()
    hall.ask("poison")
    for strike in range(1, MOST_LOSSES + 1):
        hall.start(0)
        await dispatched()
        assert len(hall.adds()) == strike
        hall.kill(0)
    end = hall.client.ends["poison"]
    assert end.reason is FinishReason.FAILED
    assert f"{MOST_LOSSES} instances" in end.detail
    hall.start(0)
    await dispatched()
    assert len(hall.adds()) == MOST_LOSSES


async def test_who_makes_progress_survives_any_number_of_losses() -> None:
    hall = Hall()
    works = {"a": (hall.ask("a", trace=25), 30)}
    for _ in range(3 * MOST_LOSSES):
        hall.start(0)
        await dispatched()
        hall.turn(0)
        hall.turn(0)
        if hall.client.ends:
            break
        hall.kill(0)
    hall.start(1)
    await finish(hall)
    hall.check_all(works)


async def test_the_random_stream_does_not_depend_on_the_slice() -> None:
    hall = Hall("scls", **SCLS)
    hall.start(0)
    hot = SamplingParams(temperature=0.8)
    for name in ("a", "b"):
        hall.ask(name, cap=12, sampling=hot, trace=12)
    hall.ask("seeded", cap=12, sampling=SamplingParams(seed=5), trace=12)
    hall.ask("greedy", cap=12, trace=12)
    await finish(hall)
    seeds: dict[str, set[int | None]] = {}
    for _, add in hall.adds():
        seeds.setdefault(add.id.split("~")[0], set()).add(add.sampling.seed)
    assert all(len(of_request) == 1 for of_request in seeds.values())
    assert seeds["seeded"] == {5}
    assert seeds["greedy"] == {None}
    assert None not in seeds["a"] | seeds["b"]
    assert seeds["a"] != seeds["b"]


async def test_cancelled_in_the_pool_and_at_an_instance() -> None:
    hall = Hall("scls", slice_tokens=4, interval=5.0)
    hall.start(0)
    hall.ask("there", trace=20)
    await dispatched()
    hall.turn(0)
    hall.ask("pooled")
    await dispatched()
    assert [add.id for _, add in hall.adds()] == ["there"]
    assert hall.client.gauges is not None
    hall.front.send(Cancel("pooled", FinishReason.CANCELLED))
    hall.front.send(Cancel("there", FinishReason.STOP))
    assert hall.sent[-1] == (0, Cancel("there", FinishReason.STOP))
    heard = list(hall.client.tokens["there"])
    for _ in range(3):
        hall.turn(0)
    assert hall.client.tokens["there"] == heard
    assert hall.client.ends == {}
    hall.check_all({})


async def test_cancelled_between_two_slices_has_no_message() -> None:
    hall = Hall("scls", slice_tokens=2, interval=5.0)
    hall.start(0)
    hall.ask("a", trace=20)
    await dispatched()
    while hall.turn(0):
        pass
    sent = len(hall.sent)
    hall.front.send(Cancel("a", FinishReason.CANCELLED))
    assert len(hall.sent) == sent
    hall.check_all({})


async def test_a_request_that_no_instance_takes_is_refused_under_its_name() -> None:
    hall = Hall()
    hall.start(0)
    hall.ask("long", cap=1000)
    await dispatched()
    hall.turn(0)
    assert list(hall.client.refused) == ["long"]
    hall.check_all({})


async def test_explained_by_the_instance() -> None:
    hall = Hall()
    hall.start(0)
    hall.ask("a", trace=20)
    await dispatched()
    hall.turn(0)
    hall.front.send(Explain(7, "a"))
    hall.turn(0)
    assert hall.client.explained[7]
    hall.front.send(Explain(8, "nobody"))
    assert hall.client.explained[8] == "it has ended"
    await finish(hall)


async def test_books_are_of_all_instances() -> None:
    hall = Hall(place="round-robin")
    hall.start(0)
    one = hall.client.ready
    hall.start(1)
    both = hall.client.ready
    assert one is not None
    assert both is not None
    assert both.max_batch == 2 * one.max_batch
    assert both.kv_tokens == one.kv_tokens, "no request can use more"
    for n in range(6):
        hall.ask(f"r{n}", prompt=(9, n), trace=20)
    await dispatched()
    hall.turn(0)
    hall.turn(1)
    gauges = hall.client.gauges
    assert gauges is not None
    assert gauges.received == 6
    assert gauges.running + gauges.waiting == 6
    each = [hall.client.instances[number][0] for number in (0, 1)]
    assert gauges.running == sum(one.running for one in each)
    assert gauges.kv_usage == pytest.approx(sum(one.kv_usage for one in each) / 2)
    hall.kill(1)
    assert hall.client.ready == one
    await finish(hall)
    assert hall.client.gauges is not None
    assert (hall.client.gauges.running, hall.client.gauges.kv_usage) == (0, 0.0)


async def test_a_request_moves_with_all_its_tokens() -> None:
    hall = Hall("scls-kv", place="round-robin", slice_tokens=2)
    hall.start(0)
    works = {f"r{n}": (hall.ask(f"r{n}", 60, (7, n), trace=40), 60) for n in range(3)}
    await dispatched()
    # A machine so slow that it pays to leave.
    hall.live[0].prices._model.model = Affine(0.01, 0.0, 0.0, 0.5, 0.0)
    for _ in range(4):
        hall.turn(0)
    hall.start(1)
    await dispatched()
    (cancelled,) = [command for _, command in hall.sent if isinstance(command, Cancel)]
    hall.turn(0)
    await dispatched()
    moved = [add for number, add in hall.adds() if number == 1]
    assert [add.id for add in moved] == [f"{cancelled.id}~1"]
    assert all(add.generated == hall.client.tokens[add.id.split("~")[0]] for add in moved)
    assert hall.client.ends == {}
    await finish(hall)
    hall.check_all(works)


async def test_slices_are_priced_by_what_instances_measure() -> None:
    hall = Hall("scls", **SCLS)
    hall.start(0)
    guessed = hall.front._cost(1000).seconds(4, 100)
    for n in range(30):
        hall.ask(f"r{n}", prompt=(3, n), trace=20)
    await dispatched()
    hall.turn(0)
    assert hall.client.instances[0][1] > 0, "its load is what it was sent"
    await finish(hall)
    measured = hall.front._cost(1000)
    assert measured.room == 900
    assert measured.most == 8
    # The scripted engine says 1 ms for a step and 10 us for a token; the guess says 10 ms.
    assert measured.seconds(4, 100) < guessed / 2
    assert hall.client.instances[0][1] == 0.0


async def test_what_instances_swap_is_told() -> None:
    hall = Hall()
    for number in (0, 1):
        hall.start(number)
        held = msgspec.structs.replace(NOTHING, host_tokens=7 + number)
        swapped = Swapped(5, 3 + number)
        hall.front.instance_said(number, Step({}, {}, [], 0.0, 0.0, held, swapped))
        assert hall.client.swapped == swapped
    assert hall.client.gauges is not None
    assert hall.client.gauges.host_tokens == 15
    hall.kill(0)
    assert hall.client.gauges.host_tokens == 8
    assert hall.client.swapped == NOTHING_SWAPPED


@settings(max_examples=20)
@given(
    preset=st.sampled_from(["past-future", "vllm", "scls", "scls-slice", "scls-pad", "scls-kv"]),
    seed=st.integers(0, 1 << 20),
)
def test_texts_are_as_if_nothing_had_happened(preset: str, seed: int) -> None:
    """Random loads, random deaths: every token once, in order, and no memory left in use."""

    async def story() -> None:
        draw = random.Random(seed)
        taken = FLEETS[preset].parameters if preset in FLEETS else {}
        short = {"slice_tokens": 5, "interval": 0.001}
        hall = Hall(preset, **{name: value for name, value in short.items() if name in taken})
        for number in range(3):
            hall.start(number)
        works = {}
        for n in range(12):
            cap = draw.randint(1, 40)
            prompt = [draw.randrange(256) for _ in range(draw.randint(1, 20))]
            works[f"r{n}"] = (hall.ask(f"r{n}", cap, prompt), cap)
        for _ in range(40):
            await asyncio.sleep(0)
            for number in list(hall.live):
                if draw.random() < 0.8:
                    hall.turn(number)
            if draw.random() < 0.15 and hall.live:
                hall.kill(draw.choice(list(hall.live)))
            if draw.random() < 0.3:
                for number in {0, 1, 2} - hall.live.keys():
                    hall.start(number)
        hall.start(9)
        await finish(hall)
        ends = hall.client.ends.values()
        failed = {end.id for end in ends if end.reason is FinishReason.FAILED}
        hall.check_all({name: work for name, work in works.items() if name not in failed})

    asyncio.run(story())
