"""Where each query token of a step finds its keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A step's sequences, packed along one token axis.

    Query token ``i`` of sequence ``s`` is row ``query_start[s] + i`` of the packed
    tensors and stands at position ``context[s] - query_tokens(s) + i`` of its sequence.

    All are contiguous and on the device of the caches.

    Attributes:
        query_start: int32 ``[n + 1]``, ascending, from 0 to the number of packed tokens.
        context: int32 ``[n]``, tokens of the sequence that have KV, this step's included.
        block_table: int32 ``[n, max_blocks]``: which cache block holds tokens
            ``j * block_size ...`` of the sequence.  Entries past the context are never read.

    Raises:
        ValueError: a tensor has another dtype, or gaps.
    """

    query_start: Tensor
    context: Tensor
    block_table: Tensor

    def __post_init__(self) -> None:
        for name in ("query_start", "context", "block_table"):
            tensor = getattr(self, name)
            # Compiled kernels read the bare memory.
            if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
                msg = f"{name} must be contiguous int32, not {tensor.dtype}, {tensor.stride()}"
                raise ValueError(msg)
