"""How long a request may be, and what becomes of settings that ask for too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.core.types import Capabilities
from penstock.engine import load_random, sizing
from penstock.engine.limits import plan_capabilities
from penstock.engine.loading import LoadedModel
from penstock.engine.support import token_limit
from tests.engine.tiny import tiny_config


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_random(tiny_config("llama"))


def planned(model: LoadedModel, **changes: int | bool | None) -> Capabilities:
    settings: dict[str, int | bool | None] = {
        "kv_tokens": 1000,
        "block_size": 16,
        "max_batch": 8,
        "max_step_tokens": 64,
        "max_request_tokens": None,
        "prefix_cache": True,
    }
    return plan_capabilities(model, **{**settings, **changes})  # type: ignore[arg-type]


def test_model_sets_the_limit(model: LoadedModel) -> None:
    assert planned(model) == Capabilities(62, 16, 8, 64, 256, prefix_cache=True)
    assert planned(model, max_request_tokens=100).max_request_tokens == 100


def test_memory_sets_the_limit(model: LoadedModel) -> None:
    assert planned(model, kv_tokens=100).max_request_tokens == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_step_tokens": 7}, r"max_step_tokens is 7; it must be at least max_batch \(8\)"),
        (
            {"max_request_tokens": 257},
            "max_request_tokens is 257; it must be at most 256, the model's max_position_embed",
        ),
        ({"kv_tokens": 15}, r"kv_tokens is 15; it must be at least block_size \(16\)"),
    ],
)
def test_settings_out_of_range(
    model: LoadedModel, changes: dict[str, int | bool | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        planned(model, **changes)


def limit_of(model_type: str, **changes: object) -> tuple[int, str]:
    limit = token_limit(tiny_config(model_type, **changes))
    assert limit is not None
    return limit.tokens, limit.reason


def test_rope_that_looks_at_the_batch() -> None:
    """A longer request would change the frequencies of the others in its step."""
    rope = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 2.0}
    longer = {**rope, "original_max_position_embeddings": 100}
    assert limit_of("llama", rope_parameters=rope) == (256, "the model's max_position_embeddings")
    assert limit_of("llama", rope_parameters=longer) == (
        100,
        "the original length of its dynamic rope",
    )
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    assert limit_of(
        "phi3",
        rope_parameters={**factors, "rope_theta": 10_000.0, "rope_type": "longrope"},
        original_max_position_embeddings=64,
    ) == (64, "the original length of its longrope rope")


def test_rope_that_is_always_the_same() -> None:
    rope = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}
    assert limit_of("llama", rope_parameters=rope)[0] == 256


def test_llama4_stays_within_its_first_chunk() -> None:
    limit = limit_of("llama4_text", attention_chunk_size=50, attn_temperature_tuning=False)
    assert limit == (50, "its attention_chunk_size")


def test_llama4_temperature_bounds_the_step() -> None:
    model = load_random(tiny_config("llama4_text", attn_temperature_tuning=True, floor_scale=60))
    assert planned(model, max_step_tokens=59).max_request_tokens == 59
    with pytest.raises(ValueError, match="max_step_tokens is 64; it must be at most 59"):
        planned(model)


def test_kv_memory_by_default(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Per layer and token: 2 heads of 16 for keys and as many for values, in float32.
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    monkeypatch.setattr("penstock.engine.sizing.free_memory", lambda _: 512 * 1000)
    assert planned(model, kv_tokens=None).kv_blocks == 400 // 16
    # Eight longest requests are all that can ever run.
    monkeypatch.setattr("penstock.engine.sizing.free_memory", lambda _: 1 << 40)
    assert planned(model, kv_tokens=None).kv_blocks == 8 * 256 // 16
    assert planned(model, kv_tokens=None, max_request_tokens=10).kv_blocks == 8


def test_no_room_for_a_block_is_not_blamed_on_a_setting(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.engine.sizing.free_memory", lambda _: 512 * 10)
    with pytest.raises(ValueError, match=r"room for only 4 KV tokens .* \(block_size: 16\)"):
        planned(model, kv_tokens=None)


def test_free_memory_heeds_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(sizing, "_CGROUP_FILES", ())
    machine = sizing.free_memory(cpu)
    assert machine > 1 << 20
    limit, usage = tmp_path / "max", tmp_path / "current"
    usage.write_text("3000\n")
    statistics = tmp_path / "memory.stat"
    monkeypatch.setattr(sizing, "_CGROUP_FILES", ((str(limit), str(usage)),))
    limit.write_text("10000\n")
    assert sizing.free_memory(cpu) == 7000
    # Only what caches files and is not in use can be had: it counts to the usage all the same.
    statistics.write_text("anon 1200\nfile 1800\ninactive_file 1000\nactive_file 800\n")
    assert sizing.free_memory(cpu) == 8000
    statistics.write_text("inactive_file 0\ntotal_inactive_file 1500\n")
    assert sizing.free_memory(cpu) == 8500
    limit.write_text("max\n")
    assert sizing.free_memory(cpu) > 1 << 20


def test_engines_beside_each_other_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "free_memory", lambda _: 1_000_000)
    cpu = torch.device("cpu")
    assert sizing.default_kv_tokens(cpu, 100, 1 << 40) == 4000
    assert sizing.default_kv_tokens(cpu, 100, 1 << 40, share=0.25) == 1000


def test_free_memory_is_what_the_kernel_could_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_CGROUP_FILES", ())
    file = tmp_path / "meminfo"
    monkeypatch.setattr(sizing, "_MEMINFO", str(file))
    cpu = torch.device("cpu")
    assert sizing.free_memory(cpu) > 1 << 20  # no such file
    file.write_text("MemTotal:  8000 kB\nMemFree:   1000 kB\nMemAvailable:  5000 kB\nPages: 0\n")
    assert sizing.free_memory(cpu) == 5000 * 1024
