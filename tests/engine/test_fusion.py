"""Fused modules compute what the modules they replace compute; others are left alone."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from penstock.engine import kernels
from penstock.engine.attention import NAME, PagedLayer, Stage, attach, detach
from penstock.engine.fusion import fuse, rules
from penstock.engine.fusion.forwards import FusedAttention, FusedLayer, Workspace
from penstock.engine.fusion.trial import close
from penstock.engine.kernels import PagedBatch, structures
from penstock.engine.loading import random_module

LAYERS, KV_HEADS, DIM, BLOCK = 2, 2, 16, 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "vocab_size": 100,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


@pytest.fixture(autouse=True)
def _native() -> None:
    if kernels.backend() == "torch":
        pytest.skip("no compiled kernels here, and nothing is fused without them")


def make(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    module = random_module(config, 0, dtype, NAME)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        # Norm weights of 1 and biases of 0 would hide a mistake.
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.3 * noise).to(dtype)
    return module


def outputs(module: PreTrainedModel) -> Tensor:
    """Logits of two sequences: chunked prefill, then prefill beside decoding, then decoding."""
    stage, shape = Stage(), (16, KV_HEADS, BLOCK)
    sites = [child for child in module.modules() if hasattr(child, "num_key_value_groups")]
    for site in sites:
        attach(site, PagedLayer(stage, shape, DIM, DIM, module.dtype, torch.device("cpu")))
    table = torch.tensor([[3, 0, 9, 5], [2, 15, 7, 1]], dtype=torch.int32)
    known, found = [0, 0], []
    ids = torch.Generator().manual_seed(2)
    for counts in ((6, 0), (5, 7), (1, 4), (1, 1), (1, 1)):
        rows = [row for row in (0, 1) if counts[row]]
        positions = torch.cat([torch.arange(counts[r]) + known[r] for r in rows])
        where = torch.cat([torch.full((counts[r],), r) for r in rows])
        stage.slots = table[where, positions // BLOCK].long() * BLOCK + positions % BLOCK
        for row in rows:
            known[row] += counts[row]
        stage.batch = PagedBatch(
            torch.tensor([0, *(counts[r] for r in rows)]).cumsum(0).to(torch.int32),
            torch.tensor([known[r] for r in rows], dtype=torch.int32),
            table[rows],
        )
        tokens = torch.randint(0, 100, (1, len(positions)), generator=ids)
        with torch.inference_mode():
            out = module(input_ids=tokens, position_ids=positions[None], use_cache=False)
        found.append(out.logits[0])
    for site in sites:
        detach(site)
    return torch.cat(found)


def fused(module: nn.Module) -> set[str]:
    """Class names of the modules that have another forward."""
    return {type(child).__name__ for child in module.modules() if "forward" in vars(child)}


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_equal(name: str) -> None:
    module = make(CONFIGS[name], torch.float32)
    before = outputs(module)
    assert fuse(module) > LAYERS
    torch.testing.assert_close(outputs(module), before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_near_to_float32_as_before(name: str) -> None:
    module = make(CONFIGS[name], torch.bfloat16)
    exact = outputs(make(CONFIGS[name], torch.bfloat16).float())
    before = (outputs(module).float() - exact).abs().mean()
    assert fuse(module) > LAYERS
    after = (outputs(module).float() - exact).abs().mean()
    assert after <= 1.2 * before


def test_a_llama_in_bfloat16_is_fused_by_layers() -> None:
    module = make(CONFIGS["llama"], torch.bfloat16)
    native = kernels.compiled()
    if native is None or not native.packs(module.lm_head.weight):
        pytest.skip("this CPU has no instructions for bfloat16 matrices")
    fuse(module)
    assert {"LlamaModel", "LlamaDecoderLayer"} <= fused(module)
    kept = {name.split(".")[-2] for name, _ in module.named_parameters()}
    assert kept == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head",
    }  # fmt: skip


def test_modules_that_compute_something_else_are_left_alone() -> None:
    module = make(GemmaConfig(**SIZES), torch.float32)
    before = outputs(module)
    assert fuse(module) == 0  # norms of 1 + weight, GELU, and a class that is not listed
    assert torch.equal(outputs(module), before)


def test_a_known_class_that_computes_something_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = LlamaAttention.forward

    def scaled(self: nn.Module, hidden_states: Tensor, **keywords: object) -> object:
        return own(self, hidden_states * 1.1, **keywords)

    monkeypatch.setattr(LlamaAttention, "forward", scaled)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    module = make(CONFIGS["llama"], torch.bfloat16)
    before = outputs(module)
    fuse(module)
    assert fused(module) == {"LlamaRMSNorm"}
    assert close(outputs(module), before)


def test_without_compiled_kernels_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    assert fuse(make(CONFIGS["llama"], torch.float32)) == 0


def test_a_norm_with_input_of_another_dtype_is_computed_as_before() -> None:
    norm = LlamaRMSNorm(64)
    norm.weight.data += torch.randn(64)
    x = torch.randn(3, 64).half()
    with torch.inference_mode():
        before = norm(x)
        assert fuse(nn.Sequential(norm)) == 1
        assert torch.equal(norm(x), before)


def test_original_weights_go_as_they_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(CONFIGS["llama"], torch.float32)
    originals = [weakref.ref(child) for child in module.modules() if type(child) is nn.Linear]
    left: list[int] = []
    pack = rules.pack

    def counting(linear: nn.Linear) -> nn.Module | None:
        left.append(sum(original() is not None for original in originals))
        return pack(linear)

    monkeypatch.setattr(rules, "pack", counting)
    fuse(module)
    assert len(originals) == LAYERS * 7 + 1
    assert max(left[:4]) <= len(originals)
    assert max(left[4:]) <= len(originals) - 7  # those of the last layer are gone


def test_a_fused_layer_does_not_keep_a_cache_alive() -> None:
    native: Any = SimpleNamespace(layer_scratch=lambda _: 8, layer=lambda *_: None)
    linear: Any = SimpleNamespace(layer=SimpleNamespace(pointers=structures.Linear(0, 0, DIM, DIM)))
    norm = SimpleNamespace(weight=torch.ones(DIM), variance_epsilon=1e-6)
    keywords = {"scale": 1.0, "window": None, "softcap": None, "sinks": None}
    module, stage = nn.Module(), Stage()
    attention = FusedAttention(module, native, nn.Identity(), nn.Identity(), keywords)
    layer = FusedLayer(native, attention, (linear,) * 4, (norm, norm), (1, DIM), Workspace())
    one = torch.ones(1, dtype=torch.int32)
    stage.slots, stage.batch = torch.tensor([0]), PagedBatch(one.new_tensor([0, 1]), one, one[None])
    cache = PagedLayer(stage, (4, 1, BLOCK), DIM, DIM, torch.bfloat16, torch.device("cpu"))
    attach(module, cache)
    layer.run(torch.zeros(1, DIM), (torch.ones(1, 1, DIM), torch.ones(1, 1, DIM)))
    left = weakref.ref(cache)
    detach(module)
    del cache
    assert left() is None
