"""The native engine keeps the contract of every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from penstock.core.engine import Work
from penstock.core.types import RequestId
from penstock.engine import LoadedModel, NativeEngine, load_random
from penstock.engine.handoff import HandoffError, LayerKV, Shapes
from penstock.testing import ScriptedEngine
from tests.conformance.engine_kit import check_engine
from tests.engine.tiny import tiny_config


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_random(tiny_config("llama"), seed=3)


def test_native_engine(model: LoadedModel) -> None:
    check_engine(lambda capabilities: NativeEngine(model, capabilities))


class Flat(NativeEngine):
    """Gives KV as one tensor on its device, as a direct transport carries it."""

    def take_kv(
        self, request_id: RequestId, start: int = 0, end: int | None = None
    ) -> LayerKV | None:
        kv = super().take_kv(request_id, start, end)
        return None if kv is None else LayerKV.from_flat(*kv.flat())


def test_native_engine_whose_kv_stays_on_its_device(model: LoadedModel) -> None:
    check_engine(lambda capabilities: Flat(model, capabilities, kv_on_device=True))


def test_a_device_without_room_has_its_copy_in_host_memory(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the host here: what counts is that someone else is asked."""
    full = [torch.OutOfMemoryError("full")]
    real_clone, real_cat = torch.Tensor.clone, torch.cat

    def once_full(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if full:
                raise full.pop()
            return real(*args, **kwargs)

        return call

    class Full(Flat):
        def take_kv(
            self, request_id: RequestId, start: int = 0, end: int | None = None
        ) -> LayerKV | None:
            full[:] = [torch.OutOfMemoryError("full")]
            monkeypatch.setattr(torch.Tensor, "clone", once_full(real_clone))
            kv = NativeEngine.take_kv(self, request_id, start, end)
            monkeypatch.setattr(torch.Tensor, "clone", real_clone)
            assert kv is None or not full
            full[:] = [torch.OutOfMemoryError("full")]
            monkeypatch.setattr(torch, "cat", once_full(real_cat))
            found = None if kv is None else LayerKV.from_flat(*kv.flat())
            monkeypatch.setattr(torch, "cat", real_cat)
            assert found is None or not full
            return found

    check_engine(lambda capabilities: Full(model, capabilities, kv_on_device=True))


@pytest.mark.parametrize(
    "shapes", [(), ((2, 3, 4),), ((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (2, 3, 4), (2, 3, 4))]
)
def test_shapes_that_a_tensor_has_not(shapes: Shapes) -> None:
    with pytest.raises(HandoffError, match="has 48 elements in shapes"):
        LayerKV.from_flat(torch.zeros(48), shapes)


@pytest.mark.parametrize("depth", [1, 2])
def test_scripted_engine(depth: int) -> None:
    check_engine(ScriptedEngine, depth=depth)


class Forgetful(ScriptedEngine):
    """Keeps what is to be forgotten."""

    def _release(self, block: int) -> None:
        if self._refs[block] > 1:
            super()._release(block)


class Late(ScriptedEngine):
    """Stops one token after the trace length."""

    def open(self, request_id: RequestId, work: Work) -> None:
        super().open(request_id, work)
        self._sequences[request_id].length += 1


@pytest.mark.parametrize("broken", [Forgetful, Late])
def test_kit_finds_faults(broken: type[ScriptedEngine]) -> None:
    with pytest.raises(AssertionError):
        check_engine(broken)
