"""KV by NIXL between two actors, many at a time, while the sender frees what was read."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("nixl", reason="NIXL has no wheel for this platform")

import ray
import torch

from penstock.cluster import direct
from penstock.cluster.direct import Direct
from penstock.cluster.parcels import ParcelLostError
from penstock.engine.handoff import LayerKV
from penstock.server.factories import kv_codec

LANES, ROUNDS = 4, 25


@pytest.fixture(scope="module")
def instances() -> Iterator[tuple[Any, Any]]:
    """A sender and a receiver."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    made = [ray.remote(End).options(num_cpus=0).remote() for _ in range(2)]
    ray.get([one.load.remote() for one in made])
    yield made[0], made[1]
    ray.shutdown()


class End:
    async def load(self) -> None:
        self.transport = Direct(kv_codec("native"), "cpu")

    async def leave(self, number: int) -> Any:
        layers = [torch.full((2, 64, 64), float(number + layer)) for layer in range(6)]
        kv = LayerKV(tuple(zip(layers[::2], layers[1::2], strict=True)))
        packed = await asyncio.to_thread(self.transport.pack, kv)
        assert packed.size == kv.bytes
        # A reference in the answer itself would be read on the way.
        return tuple(packed.what)

    async def take(self, parcel: Any, *, ahead: bool) -> list[float]:
        if ahead:
            await self.transport.fetch(parcel)
        found = (await self.transport.unpack(parcel)).what
        assert not self.transport._ahead or ahead
        return [float(part.unique()) for layer in found.layers for part in layer]


def test_many_at_a_time_arrive_as_they_were(instances: tuple[Any, Any]) -> None:
    sender, receiver = instances

    async def lane(first: int) -> None:
        for number in range(first, LANES * ROUNDS, LANES):
            parcel = await sender.leave.remote(number)
            found = await receiver.take.remote(parcel, ahead=number % 2 == 0)
            assert found == [number + layer for layer in range(6)]

    async def all_lanes() -> None:
        await asyncio.gather(*[lane(first) for first in range(LANES)])

    asyncio.run(all_lanes())


class Offered:
    """In place of Ray: references are what they refer to, and reads may fail."""

    def __init__(self) -> None:
        self.failures = 0

    def put(self, value: Any, **_: Any) -> Any:
        return value

    def get(self, value: Any, **_: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the link is down")
        return value


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Offered:
    made = Offered()
    monkeypatch.setattr(direct, "ray", made)
    return made


def sample(value: float) -> LayerKV:
    return LayerKV(((torch.full((1, 3, 2), value), torch.full((1, 3, 2), value)),))


@pytest.mark.usefixtures("offered")
async def test_what_was_read_ahead_is_let_go_once_it_is_taken() -> None:
    transport = Direct(kv_codec("native"), "cpu")
    parcel = transport.pack(sample(1.0)).what
    gone = weakref.ref(parcel[0])
    await transport.fetch(parcel)
    unpacked = await transport.unpack(parcel)
    assert unpacked.what.tokens == 3
    del unpacked, parcel
    await asyncio.sleep(0.01)
    gc.collect()
    assert gone() is None
    assert transport._ahead == {}


@pytest.mark.usefixtures("offered")
async def test_what_nobody_comes_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "PATIENCE", 0.05)
    transport = Direct(kv_codec("native"), "cpu")
    await transport.fetch(transport.pack(sample(1.0)).what)
    assert len(transport._ahead) == 1
    await asyncio.sleep(0.1)
    assert transport._ahead == {}


async def test_a_read_that_failed_ahead_is_tried_once_more(offered: Offered) -> None:
    transport = Direct(kv_codec("native"), "cpu")
    parcel = transport.pack(sample(2.0)).what
    offered.failures = 1
    await transport.fetch(parcel)
    assert (await transport.unpack(parcel)).what.tokens == 3
    offered.failures = 2
    await transport.fetch(parcel)
    with pytest.raises(ParcelLostError, match="the link is down"):
        await transport.unpack(parcel)


async def test_what_cannot_be_offered_goes_as_bytes(
    offered: Offered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = Direct(kv_codec("native"), "cpu")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot register")

    monkeypatch.setattr(offered, "put", refuse)
    packed = transport.pack(sample(3.0))
    assert isinstance(packed.what, bytes)
    await transport.fetch(packed.what)
    found = await transport.unpack(packed.what)
    assert found.what.tokens == 3
    assert "cannot register" in capsys.readouterr().err
