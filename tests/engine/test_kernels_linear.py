"""Packed linear layers compute what the layers they replace compute."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from penstock.engine import kernels
from penstock.engine.kernels import linear as linear_module
from penstock.engine.kernels import prepack
from penstock.engine.kernels.linear import NativeLinear, OneDNNLinear


def linear_and_exact(
    rows: int,
    width: int,
    out: int,
    bias: bool,
    dtype: torch.dtype,
) -> tuple[nn.Linear, Tensor, Tensor]:
    linear = nn.Linear(width, out, bias=bias).to(dtype)
    x = torch.randn(1, rows, width).to(dtype)
    exact = nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    return linear, x, exact


# More than 32 rows, and more than 256, take other ways through AMX.
counts = st.one_of(st.integers(1, 70), st.sampled_from([96, 256, 257, 300]))
shapes = st.tuples(counts, st.integers(1, 100), st.integers(1, 100), st.booleans())


# Without vector instructions for bfloat16 oneDNN has no such layout, and none is asked for.
HAS_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
DTYPES = [torch.float32, torch.bfloat16][: 1 + HAS_BFLOAT16]


@settings(max_examples=40)
@given(shape=shapes, dtype=st.sampled_from(DTYPES))
def test_onednn_layout_is_linear(shape: tuple[int, int, int, bool], dtype: torch.dtype) -> None:
    linear, x, exact = linear_and_exact(*shape, dtype)
    with torch.inference_mode():
        packed = OneDNNLinear(linear)(x)
    assert packed.dtype == dtype
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(packed.double(), exact, atol=tolerance, rtol=tolerance)


# Multiples of 32 go to AMX where there is one.
widths = st.one_of(st.integers(1, 100).map(lambda n: 2 * n), st.sampled_from([32, 160, 288, 512]))


@settings(max_examples=80)
@given(shape=shapes, width=widths)
def test_native_layout_is_linear(shape: tuple[int, int, int, bool], width: int) -> None:
    rows, _, out, bias = shape
    native = kernels.compiled()
    linear, x, exact = linear_and_exact(rows, width, out, bias, torch.bfloat16)
    if native is None or not native.packs(linear.weight):
        pytest.skip("this CPU has no instructions for bfloat16 matrices, or there is no compiler")
    with torch.inference_mode():
        packed = NativeLinear(linear, native)(x)
    # Sums are float32: only the last rounding to bfloat16 is lost.
    torch.testing.assert_close(packed.double(), exact, atol=1e-4, rtol=2**-8)


def test_native_layout_refuses_other_dtypes() -> None:
    native = kernels.compiled()
    linear = nn.Linear(4, 4).to(torch.bfloat16)
    if native is None or not native.packs(linear.weight):
        pytest.skip("this CPU has no instructions for bfloat16 matrices, or there is no compiler")
    with pytest.raises(TypeError, match=r"was given torch\.float32"):
        NativeLinear(linear, native)(torch.randn(1, 4))


@pytest.mark.parametrize("tied", [False, True])
def test_a_prepacked_model_gives_the_same_logits(*, tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 100, (1, 12))
    with torch.inference_mode():
        before = model(ids).logits
        assert prepack(model) == 2 * 7 + 1
        after = model(ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not any(type(module) is nn.Linear for module in model.modules())
    # All weights but the embeddings (and the norms) have left the model.
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


def test_subclasses_and_other_dtypes_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), nn.Linear(8, 8, dtype=torch.float64))
    assert prepack(model) == 0


def test_original_weights_go_as_they_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)))
    originals = [weakref.ref(child) for child in model.modules() if type(child) is nn.Linear]
    left: list[int] = []
    pack = linear_module.pack

    def counting(linear: nn.Linear) -> nn.Module | None:
        left.append(sum(original() is not None for original in originals))
        return pack(linear)

    monkeypatch.setattr(linear_module, "pack", counting)
    assert prepack(model) == 8
    assert left == [8, 7, 6, 5, 4, 3, 2, 1]


def test_a_shared_layer_is_packed_once_and_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(shared), nn.Linear(8, 8), nn.Sequential(shared))
    x = torch.randn(1, 8)
    with torch.inference_mode():
        before = model(x)
        assert prepack(model) == 3
        torch.testing.assert_close(model(x), before)
    assert model[0][0] is model[2][0]
