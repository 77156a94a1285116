"""From what a model can do and what was asked for to the engine's capabilities."""

from __future__ import annotations

from penstock.core.types import Capabilities
from penstock.engine.loading import LoadedModel
from penstock.engine.sizing import default_kv_tokens
from penstock.engine.support import step_limit, token_limit

_LONGEST = 1 << 20
"""Most tokens of a request of a model that knows no limit."""


def plan_capabilities(
    model: LoadedModel,
    *,
    kv_tokens: int | None,
    block_size: int,
    max_batch: int,
    max_step_tokens: int,
    max_request_tokens: int | None,
    prefix_cache: bool,
    swap_tokens: int = 0,
    memory_share: float = 1.0,
) -> Capabilities:
    """Check settings against a model and fill in those that were left open.

    Raises:
        ValueError: naming the setting, its value and what would be right.
    """
    if max_step_tokens < max_batch:
        msg = (
            f"max_step_tokens is {max_step_tokens}; it must be at least max_batch ({max_batch}), "
            "or not all running requests can decode"
        )
        raise ValueError(msg)
    step = step_limit(model.config)
    if step is not None and max_step_tokens > step.tokens:
        msg = f"max_step_tokens is {max_step_tokens}; it must be at most {step.tokens}, "
        raise ValueError(msg + step.reason)
    request = token_limit(model.config)
    longest = _LONGEST if request is None else request.tokens
    if max_request_tokens is not None:
        if request is not None and max_request_tokens > request.tokens:
            msg = f"max_request_tokens is {max_request_tokens}; it must be at most {longest}, "
            raise ValueError(msg + request.reason)
        longest = max_request_tokens
    if kv_tokens is None:
        kv_tokens = _what_fits(model, block_size, max_batch, longest, memory_share)
    if kv_tokens < block_size:
        msg = f"kv_tokens is {kv_tokens}; it must be at least block_size ({block_size})"
        raise ValueError(msg)
    return Capabilities(
        kv_blocks=kv_tokens // block_size,
        block_size=block_size,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_request_tokens=min(longest, kv_tokens),
        prefix_cache=prefix_cache,
        swap_tokens=swap_tokens,
    )


def _what_fits(
    model: LoadedModel, block_size: int, max_batch: int, longest: int, share: float
) -> int:
    """KV tokens for as many of the longest requests, each in whole blocks, as there is room for."""
    most = max_batch * -(-longest // block_size) * block_size
    tokens = default_kv_tokens(model.device, model.kv_bytes_per_token, most, share)
    if tokens < block_size:
        msg = (
            f"there is room for only {tokens} KV tokens in the free memory of {model.device}, less "
            f"than one block (block_size: {block_size}); free some, or set kv_tokens yourself"
        )
        raise ValueError(msg)
    return tokens
