"""Both attention implementations against a naive one that follows the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.engine import kernels
from penstock.engine.kernels import PagedBatch, portable
from penstock.engine.kernels.build import BuildError, library
from penstock.engine.kernels.native import Native


@pytest.fixture(scope="module")
def native() -> Native:
    try:
        return Native(library())
    except BuildError as error:
        pytest.skip(f"no compiled kernels here: {error}")


@dataclass
class Case:
    query: Tensor
    keys: list[Tensor]  # per sequence [context, kv_heads, dim], what the cache should hold
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    batch: PagedBatch
    slots: Tensor
    options: dict[str, object]


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Case:
    """A random step: mixed prefill and decode, blocks scattered over the cache."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 20]))
    dim = draw(st.sampled_from([8, 16, 24, 32, 64, 96, 256]))
    value_dim = draw(st.sampled_from([dim, 16, 40]))
    block_size = draw(st.sampled_from([1, 4, 16, 64]))
    lengths = draw(
        st.lists(
            st.tuples(
                st.one_of(st.just(1), st.just(1), st.integers(1, 90)),
                st.one_of(st.integers(0, 40), st.integers(0, 300)),
            ),
            min_size=1,
            max_size=5,
        )
    )
    contexts = [new + past for new, past in lengths]
    needed = [-(-context // block_size) for context in contexts]
    spare = 3
    blocks = torch.randperm(sum(needed) + spare, generator=generator).tolist()
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([blocks.pop() for _ in range(count)])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # What nobody has written may hold anything.
    shape = (sum(needed) + spare, kv_heads, block_size)
    key_cache = torch.full((*shape, dim), math.nan, dtype=dtype)
    value_cache = torch.full((*shape, value_dim), math.nan, dtype=dtype)
    keys = [normal(context, kv_heads, dim) for context in contexts]
    values = [normal(context, kv_heads, value_dim) for context in contexts]
    slots = []
    for row, context in enumerate(contexts):
        token = torch.arange(context)
        slots.append(table[row, token // block_size].long() * block_size + token % block_size)
    starts = torch.tensor([0, *(new for new, _ in lengths)]).cumsum(0).to(torch.int32)
    query = normal(kv_heads * group, int(starts[-1]), dim).transpose(0, 1)
    sinks = normal(kv_heads * group) if draw(st.booleans()) else None
    return Case(
        query,
        keys,
        values,
        key_cache,
        value_cache,
        PagedBatch(starts, torch.tensor(contexts, dtype=torch.int32), table),
        torch.cat(slots),
        {
            "scale": draw(st.sampled_from([1.0, dim**-0.5])),
            "window": draw(st.one_of(st.none(), st.integers(1, 200))),
            "softcap": draw(st.sampled_from([None, 5.0])),
            "sinks": sinks,
        },
    )


def naive(case: Case) -> Tensor:
    """Attention in float64 with whole score matrices, one sequence at a time."""
    scale, window, softcap, sinks = (
        case.options[name] for name in ("scale", "window", "softcap", "sinks")
    )
    rows = []
    starts = case.batch.query_start.tolist()
    for s in range(len(case.keys)):
        query = case.query[starts[s] : starts[s + 1]].double()
        group = query.shape[1] // case.keys[s].shape[1]
        key = case.keys[s].double().repeat_interleave(group, dim=1)
        value = case.values[s].double().repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", query, key) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        position = torch.arange(len(key) - len(query), len(key))[:, None]
        token = torch.arange(len(key))
        seen = token <= position
        if window is not None:
            seen &= token > position - window
        logits[:, ~seen] = -math.inf
        if sinks is not None:
            extra = sinks.double()[:, None, None].expand(-1, len(query), 1)
            logits = torch.cat([logits, extra], dim=2)
        weights = logits.softmax(dim=2)[:, :, : len(key)]
        rows.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(rows)


# Scores reach some tens where the scale is 1, and their rounding is multiplied by that.
FLOAT32 = 1e-4


def check(case: Case, implementation: object, tolerance: float) -> None:
    flat_keys, flat_values = torch.cat(case.keys), torch.cat(case.values)
    implementation.store_kv(flat_keys, flat_values, case.key_cache, case.value_cache, case.slots)
    block_size = case.key_cache.shape[2]
    stored = case.key_cache[case.slots // block_size, :, case.slots % block_size]
    assert torch.equal(stored, flat_keys)
    stored = case.value_cache[case.slots // block_size, :, case.slots % block_size]
    assert torch.equal(stored, flat_values)
    out = implementation.paged_attention(
        case.query, case.key_cache, case.value_cache, case.batch, **case.options
    )
    assert out.dtype == case.query.dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), naive(case), atol=tolerance, rtol=tolerance)


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_native_is_attention_in_float32(native: Native, case: Case) -> None:
    check(case, native, FLOAT32)


@settings(max_examples=50, deadline=None)
@given(case=cases(torch.bfloat16))
def test_native_is_attention_in_bfloat16(native: Native, case: Case) -> None:
    check(case, native, 2e-2)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_portable_is_attention_in_float32(case: Case) -> None:
    check(case, portable, FLOAT32)


@settings(max_examples=20, deadline=None)
@given(case=cases(torch.bfloat16))
def test_portable_is_attention_in_bfloat16(case: Case) -> None:
    check(case, portable, 5e-2)


@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_public_functions_dispatch(case: Case) -> None:
    check(case, kernels, FLOAT32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_a_long_context_is_the_same_however_many_threads_split_it(
    native: Native, threads: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    context, kv_heads, dim, block_size = 3000, 1, 64, 16
    key, value = torch.randn(2, context, kv_heads, dim).to(dtype)
    blocks = -(-context // block_size)
    caches = torch.zeros(2, blocks, kv_heads, block_size, dim, dtype=dtype)
    table = torch.randperm(blocks, dtype=torch.int32)[None]
    token = torch.arange(context)
    case = Case(
        torch.randn(3, 4, dim).to(dtype),
        [key],
        [value],
        caches[0],
        caches[1],
        PagedBatch(
            torch.tensor([0, 3], dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
            table,
        ),
        table[0, token // block_size].long() * block_size + token % block_size,
        {"scale": 0.125, "window": 2500, "softcap": None, "sinks": torch.randn(4).to(dtype)},
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, native, tolerance)
    finally:
        torch.set_num_threads(before)


def test_a_step_without_sequences_is_empty(native: Native) -> None:
    batch = PagedBatch(*(torch.zeros(n, dtype=torch.int32) for n in (1, 0, (0, 1))))
    caches = torch.zeros(2, 1, 1, 16, 8)
    for implementation in (native, portable):
        out = implementation.paged_attention(torch.zeros(0, 2, 8), *caches, batch, scale=1.0)
        assert out.shape == (0, 2, 8)


def test_a_batch_of_other_integers_is_refused() -> None:
    good = torch.zeros(2, dtype=torch.int32)
    table = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"context must be contiguous int32, not torch\.int64"):
        PagedBatch(good, good[:1].long(), table)
    with pytest.raises(ValueError, match="block_table must be contiguous"):
        PagedBatch(good, good[:1], torch.zeros(2, 8, dtype=torch.int32)[:, ::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_layer_kernels_refuse_dtypes_that_they_would_misread(
    native: Native, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(2, 8).to(dtype), torch.ones(8)
    for wrong in ((x, weight), (x, weight.to(dtype)), (weight[None], weight.bfloat16())):
        with pytest.raises(TypeError, match="they take all float32 or all bfloat16"):
            native.rms_norm(*wrong, 1e-6)
    with pytest.raises(TypeError, match=f"were given {dtype} on cpu"):
        native.gated_silu(x)


@pytest.mark.parametrize("wrong", range(5))
def test_rotation_refuses_mixed_dtypes(native: Native, wrong: int) -> None:
    tensors = [torch.randn(1, 24), *torch.randn(2, 1, 8), *torch.zeros(2, 1, 1, 4, 8)]
    tensors[wrong] = tensors[wrong].bfloat16()
    qkv, cos, sin, keys, values = tensors
    with pytest.raises(TypeError, match=r"torch\.bfloat16 on cpu, torch\.float32 on cpu"):
        native.rotate_and_store(qkv, (cos, sin), (keys, values), torch.tensor([0]))


def test_rotation_refuses_norms_of_another_dtype(native: Native) -> None:
    qkv, angles, caches = torch.randn(1, 24), torch.randn(2, 1, 8), torch.zeros(2, 1, 1, 4, 8)
    norms = torch.ones(8), torch.ones(8, dtype=torch.float16), 1e-6
    with pytest.raises(TypeError, match=r"torch\.float16 on cpu, torch\.float32 on cpu"):
        native.rotate_and_store(qkv, tuple(angles), tuple(caches), torch.tensor([0]), norms)
