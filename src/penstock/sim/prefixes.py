"""Shared prefixes of a trace's requests, as the keys of KV blocks.

A trace such as Mooncake's names the blocks of each prompt, of 512 tokens: equal ids mean equal
tokens up to there.  Each is cut into blocks of the simulated machine, which it must divide into.
"""

from __future__ import annotations

from penstock.bench.workload import Workload
from penstock.core.types import PrefixKey

_KEY_BYTES = 8


def check_prefixes(workload: Workload, block_size: int, scale: float) -> None:
    """Refuse what cannot be shared.

    Raises:
        ValueError: the workload names no shared blocks, or they are not whole blocks here.
    """
    if workload.hash_ids is None:
        msg = f"prefix_cache: {workload.source} does not say what its requests share (hash_ids)"
        raise ValueError(msg)
    if scale != 1:
        msg = f"scale is {scale}; with prefix_cache it must be 1: shared blocks have their size"
        raise ValueError(msg)
    if workload.hash_block % block_size:
        msg = (
            f"block_size is {block_size}; with prefix_cache it must divide the trace's blocks of "
            f"{workload.hash_block} tokens"
        )
        raise ValueError(msg)


def prefixes_of(workload: Workload, block_size: int) -> list[tuple[PrefixKey, ...]]:
    """The keys of each request's full blocks, in order."""
    assert workload.hash_ids is not None
    each = workload.hash_block // block_size
    known: dict[int, tuple[PrefixKey, ...]] = {}
    prefixes = []
    for ids, prompt in zip(workload.hash_ids, workload.prompt.tolist(), strict=True):
        keys: list[PrefixKey] = []
        for name in ids:
            blocks = known.get(name)
            if blocks is None:
                first = name * each
                blocks = known[name] = tuple(
                    (first + i).to_bytes(_KEY_BYTES, "big") for i in range(each)
                )
            keys += blocks
        prefixes.append(tuple(keys[: prompt // block_size]))
    return prefixes
