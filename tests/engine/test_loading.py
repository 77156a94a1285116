"""What loads, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedConfig

from penstock.core.types import Capabilities
from penstock.engine import (
    CheckpointError,
    NativeEngine,
    UnsupportedModelError,
    kernels,
    load_model,
    load_random,
)
from penstock.engine.loading import random_module, resolve_device, resolve_dtype
from tests.engine.drive import TIGHT, Job, Recorder, generate, prompts, serve
from tests.engine.tiny import tiny_config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = tiny_config("qwen3", eos_token_id=17)
    random_module(config, 4, torch.float32, "eager").save_pretrained(tmp_path)
    return tmp_path


def test_checkpoint_says_what_its_model_says(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint))
    assert loaded.dtype is torch.float32
    assert loaded.eos_ids == {17}
    texts = serve(Recorder(loaded, TIGHT), [Job(p, 6) for p in prompts()]).texts
    expected = generate(tiny_config("qwen3"), 4, prompts(), 6)
    for index, text in enumerate(expected):
        cut = text.index(17) + 1 if 17 in text else 6
        assert texts[str(index)] == text[:cut]


def test_untested_types_are_named(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(str(checkpoint))
    assert caplog.messages == []
    monkeypatch.setattr("penstock.engine.loading.TESTED_TYPES", frozenset())
    load_model(str(checkpoint))
    assert "model type 'qwen3' is not among those whose output is tested" in caplog.text


def test_incomplete_weights(checkpoint: Path) -> None:
    """transformers would make up what is missing."""
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_model(str(checkpoint))


def test_damaged_configuration(checkpoint: Path) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    settings["num_attention_heads"] = "many"
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        load_model(str(checkpoint))


def test_end_tokens_of_the_generation_config_count(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 17]}))
    assert load_model(str(checkpoint)).eos_ids == {3, 17}


def test_dtype_is_converted(checkpoint: Path) -> None:
    assert load_model(str(checkpoint), dtype="bfloat16").dtype is torch.bfloat16


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"only pickled weights.*pytorch_model.bin.*safetens"):
        load_model(str(checkpoint))


def test_missing_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no .safetensors file"):
        load_model(str(checkpoint))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(str(tmp_path / "nowhere"))


def test_damaged_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(str(checkpoint))


def test_demo_model_runs() -> None:
    engine = NativeEngine.load("demo", kv_tokens=256, max_batch=2, max_step_tokens=32)
    assert engine.eos_ids
    assert engine.capabilities == Capabilities(16, 16, 2, 32, 256, prefix_cache=True)
    engine.close()


def config_of(model_type: str, **settings: object) -> PreTrainedConfig:
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "n_embd": 32,
        "d_model": 32,
        "num_hidden_layers": 2,
        "n_layer": 2,
        "n_layers": 2,
        "num_attention_heads": 4,
        "n_head": 4,
        "n_heads": 4,
        "intermediate_size": 48,
    }
    return AutoConfig.for_model(model_type, **{**small, **settings})


LLAMA = {"num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("bloom"), "does not declare support for attention back ends"),
        (config_of("mpt"), "does not declare support for attention back ends"),
        (config_of("mamba"), "its linear_attention layers need state"),
        (config_of("lfm2", layer_types=["conv", "full_attention"]), "its conv layers need state"),
        (
            config_of("minimax", layer_types=["linear_attention", "full_attention"]),
            "its linear_attention layers need state",
        ),
        (config_of("bert"), "its attention is not causal"),
        (config_of("diffllama", **LLAMA), "called the attention function 4 times from 2 places"),
        (config_of("doge", **LLAMA), "it builds an attention mask of its own"),
        (config_of("t5"), "encoder-decoder"),
        (config_of("siglip_text_model"), "not a causal language model"),
        (AutoConfig.for_model("gemma3"), "multimodal"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_unsupported_models(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        load_random(config)
    assert repr(config.model_type) in str(caught.value)


def test_unsupported_checkpoint_is_not_called_broken(tmp_path: Path) -> None:
    config_of("bloom").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="bloom"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("flagged", ["bloom", "mpt"])
def test_probe_catches_models_that_ignore_our_attention(
    flagged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if transformers declared these, which compute attention by themselves."""
    monkeypatch.setattr(
        "transformers.PreTrainedModel.is_backend_compatible", classmethod(lambda _: True)
    )
    monkeypatch.setattr("transformers.PreTrainedModel._supports_attention_backend", True)
    with pytest.raises(UnsupportedModelError, match=r"called the attention function 0|fails"):
        load_random(config_of(flagged))


def test_window_that_the_model_keeps_to_itself() -> None:
    """PhiMoE relies on its mask for the window, and we build none."""
    moe = {"num_local_experts": 2, **LLAMA}
    with pytest.raises(UnsupportedModelError, match="layer 0 passes sliding_window=None"):
        load_random(config_of("phimoe", sliding_window=8, **moe))
    load_random(config_of("phimoe", sliding_window=64, **moe))  # as long as the context: none


def test_model_that_looks_into_its_linear_layers() -> None:
    config = config_of("hunyuan_v1_moe", num_experts=2, moe_topk=1, head_dim=8, **LLAMA)
    with pytest.raises(UnsupportedModelError, match=r"hunyuan_v1_moe.*weight"):
        NativeEngine(load_random(config), TIGHT)


@pytest.mark.parametrize(
    ("declared", "device", "expected"),
    [
        (torch.float16, "cpu", torch.float32),
        (torch.float16, "cuda", torch.float16),
        (torch.bfloat16, "cuda", torch.bfloat16),
        (None, "cpu", torch.float32),
    ],
)
def test_auto_dtype(declared: torch.dtype | str | None, device: str, expected: torch.dtype) -> None:
    config = config_of("llama", dtype=declared)
    assert resolve_dtype("auto", config, torch.device(device)) is expected


@pytest.mark.parametrize("declared", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_what_the_cpu_is_quick_at(
    declared: torch.dtype | str,
    has: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: has)
    config = config_of("llama", dtype=declared)
    assert resolve_dtype("auto", config, torch.device("cpu")) is expected
    assert resolve_dtype("bfloat16", config, torch.device("cpu")) is torch.bfloat16


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype is 'int4'; it must be one of auto, float32"):
        resolve_dtype("int4", config_of("llama"), torch.device("cpu"))


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99", ""])
def test_unusable_device(device: str) -> None:
    with pytest.raises(ValueError, match="device is"):
        resolve_device(device)
