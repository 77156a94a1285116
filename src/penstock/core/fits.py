"""Whether a request can be served at all."""

from __future__ import annotations

from penstock.core.memory import blocks_for
from penstock.core.types import Capabilities, Request, RequestError


def check_fits(request: Request, capabilities: Capabilities) -> None:
    """Raise RequestError, which names the field, if it can never be."""
    longest = request.prompt_tokens + request.cap
    size = capabilities.block_size
    what = f"prompt ({request.prompt_tokens} tokens) and max_tokens ({request.cap})"
    msg = ""
    if longest > capabilities.max_request_tokens:
        limit = capabilities.max_request_tokens
        msg = f"{what} are {longest} tokens together; at most {limit} are allowed"
    # The last token's KV is never computed.
    elif blocks_for(longest - 1, size) > capabilities.kv_blocks:
        room = capabilities.kv_tokens
        msg = f"{what} need KV memory for {longest - 1} tokens; there is room for {room}"
    if msg:
        raise RequestError("max_tokens", msg)
    full = request.prompt_tokens // size
    if len(request.prefix) > full:
        msg = f"prefix has {len(request.prefix)} keys for {full} full blocks of {size} tokens"
        raise RequestError("prefix", msg)
