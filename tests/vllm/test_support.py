"""What is refused at start, by name: with vLLM's own configuration objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from penstock.vllm.support import capabilities_of, check_supported
from tests.vllm.engine import Loop


def kv(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=groups)


FULL = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=1, dtype=torch.float32)
SLIDING = SlidingWindowSpec(
    block_size=4, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=8
)


def config(**changes: Any) -> Any:
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            data_parallel_size=1,
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=8,
            max_num_active_seqs=None,
            max_num_batched_tokens=32,
            max_num_scheduled_tokens=None,
            long_prefill_token_threshold=0,
            enable_chunked_prefill=True,
        ),
        model_config=SimpleNamespace(
            runner_type="generate", is_encoder_decoder=False, is_diffusion=False, max_model_len=99
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        kv_events_config=None,
        max_concurrent_batches=2,
    )
    for path, value in changes.items():
        owner: Any = made
        *parents, name = path.split("__")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": 1}, "--speculative-config"),
        ({"kv_transfer_config": 1}, "--kv-transfer-config"),
        ({"ec_transfer_config": 1}, "--ec-transfer-config"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "--kv-events"),
        ({"aux_output_config": SimpleNamespace(enabled=True)}, "--enable-return-routed-experts"),
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2"),
        (
            {"parallel_config__data_parallel_size": 4},
            "--data-parallel-size of a mixture of experts is 4",
        ),
        ({"scheduler_config__enable_chunked_prefill": False}, "--no-enable-chunked-prefill"),
        ({"scheduler_config__long_prefill_token_threshold": 9}, "--long-prefill-token-threshold"),
        ({"scheduler_config__max_num_batched_tokens": 7}, "--max-num-batched-tokens is 7"),
        ({"model_config__runner_type": "pooling"}, "--runner is pooling"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_config__is_diffusion": True}, "diffusion"),
    ],
)
def test_what_would_be_served_wrongly_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    check_supported(config(), kv(FULL))
    with pytest.raises(ValueError, match=message):
        check_supported(config(**changes), kv(FULL))


@pytest.mark.parametrize("specs", [(), (SLIDING,), (FULL, SLIDING)])
def test_only_full_attention_is_served(specs: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="only one kind, of full attention"):
        check_supported(config(), kv(*specs))


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"--kv-transfer.*diffusion"):
        check_supported(config(kv_transfer_config=1, model_config__is_diffusion=True), kv(FULL))


def test_capabilities_are_vllms() -> None:
    made = capabilities_of(config(), kv(FULL), 4)
    assert (made.kv_blocks, made.block_size, made.max_batch) == (9, 4, 8)
    assert (made.max_step_tokens, made.max_request_tokens, made.depth) == (32, 99, 2)
    assert made.prefix_cache
    fewer = capabilities_of(config(scheduler_config__max_num_active_seqs=3), kv(FULL), 4)
    assert fewer.max_batch == 3


def test_the_whole_is_refused_in_vllms_constructor() -> None:
    with pytest.raises(ValueError, match="--no-enable-chunked-prefill"):
        Loop(chunked=False, max_num_batched_tokens=128)
    with pytest.raises(ValueError, match=r"penstock\.scheduler\.preset"):
        Loop({"scheduler": {"preset": 5}})
    with pytest.raises(ValueError, match="preset 'past' is unknown"):
        Loop({"scheduler": {"preset": "past"}})
