"""What of vLLM the scheduler can drive, and what it can do.

Refused at start, by the name of the flag: whatever vLLM's own scheduler does for a feature and
this one does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from penstock.core.types import Capabilities

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

TESTED = ("0.31.", "0.32.", "0.33.")
"""Versions of vLLM that this plug-in was tested with: its scheduler interface is not public."""


def check_supported(config: VllmConfig, kv: KVCacheConfig) -> None:
    """Refuse what would be served wrongly.

    Raises:
        ValueError: names each flag at fault, and says what would be right.
    """
    faults = [*_of_flags(config), *_of_model(config, kv)]
    if faults:
        raise ValueError("penstock.vllm.Scheduler: " + "; ".join(faults))


def capabilities_of(config: VllmConfig, kv: KVCacheConfig, block_size: int) -> Capabilities:
    """What vLLM's engine can do, in Penstock's words."""
    scheduler = config.scheduler_config
    tokens = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    return Capabilities(
        kv_blocks=kv.num_blocks - 1,  # vLLM keeps block 0 for itself
        block_size=block_size,
        max_batch=scheduler.max_num_active_seqs or scheduler.max_num_seqs,
        max_step_tokens=tokens,
        max_request_tokens=config.model_config.max_model_len,
        depth=config.max_concurrent_batches,
        prefix_cache=bool(config.cache_config.enable_prefix_caching),
    )


def _of_flags(config: VllmConfig) -> Iterator[str]:
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if config.speculative_config is not None:
        yield "--speculative-config is not supported"
    if config.kv_transfer_config is not None:
        yield "--kv-transfer-config is not supported"
    if config.ec_transfer_config is not None:
        yield "--ec-transfer-config is not supported"
    if config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events:
        yield "--kv-events-config is not supported: no events would be published"
    if getattr(getattr(config, "aux_output_config", None), "enabled", False):
        yield "--enable-return-routed-experts is not supported"
    # Of a dense model each data-parallel engine is told that it is alone, and it is.
    for name in ("pipeline", "decode_context", "prefill_context", "data"):
        if (size := getattr(parallel, f"{name}_parallel_size")) > 1:
            of = " of a mixture of experts" if name == "data" else ""
            yield f"--{name.replace('_', '-')}-parallel-size{of} is {size}; it must be 1"
    if scheduler.long_prefill_token_threshold > 0:
        yield "--long-prefill-token-threshold is not supported: the preset shares out a step"
    if not scheduler.enable_chunked_prefill:
        yield "--no-enable-chunked-prefill is not supported: prompts are computed in chunks"
    tokens = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    if tokens < scheduler.max_num_seqs:
        yield (
            f"--max-num-batched-tokens is {tokens}; it must be at least --max-num-seqs "
            f"({scheduler.max_num_seqs}), or not all running requests can decode"
        )


def _of_model(config: VllmConfig, kv: KVCacheConfig) -> Iterator[str]:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

    model = config.model_config
    if model.runner_type != "generate":
        yield f"--runner is {model.runner_type}; it must be generate"
    if model.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    if model.is_diffusion:
        yield "diffusion models are not supported"
    specs = [group.kv_cache_spec for group in kv.kv_cache_groups]
    specs = [s.first_spec if isinstance(s, UniformTypeKVCacheSpecs) else s for s in specs]
    if len(specs) != 1 or not isinstance(specs[0], FullAttentionSpec):
        kinds = ", ".join(type(spec).__name__ for spec in specs) or "none"
        yield (
            f"the model's KV caches are {kinds}; only one kind, of full attention, is supported"
            " (--disable-hybrid-kv-cache-manager makes sliding windows such)"
        )
