"""What vLLM asks of its KV cache manager, answered by Penstock's books.

vLLM's own manager is there, and idle: what reads its layout (its coordinator, its groups) still
can.  Nothing is allocated or freed through it: blocks are given back when no plan in flight names
them, which Penstock's scheduler knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.stats import PrefixCacheStats

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


class NewBlocks:
    """Blocks of one request, as vLLM's scheduler output wants them: one group."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def get_block_ids(self, *, allow_none: bool = False) -> tuple[list[int]] | None:
        """Their numbers; None for no blocks, where that is allowed."""
        return None if allow_none and not self.numbers else (self.numbers,)


class KVFacade:
    """Stands where vLLM's KV cache manager stood.

    Args:
        manager: vLLM's.
        usage: the share of KV blocks that requests hold, 0 to 1.
        reset: forgets the prefix cache; False if some request holds blocks.
    """

    def __init__(
        self, manager: KVCacheManager, usage: Callable[[], float], reset: Callable[[], bool]
    ) -> None:
        self._manager = manager
        self._usage = usage
        self._reset = reset
        self._stats = PrefixCacheStats()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    @property
    def usage(self) -> float:
        """The share of KV blocks that requests hold, 0 to 1."""
        return self._usage()

    def free(self, request: Request) -> None:
        """Nothing: a plan will."""

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Nothing: plans say which blocks are shared."""

    def estimate_cached_tokens(self, request: Request) -> int:
        """Tokens of it whose KV others could begin with: its full blocks."""
        size: int = self._manager.block_pool.hash_block_size
        computed: int = request.num_computed_tokens - request.num_output_placeholders
        return max(0, min(computed, len(request.block_hashes) * size)) // size * size

    def record(self, request: Request, cached: int) -> None:
        """It has started with so many tokens from the prefix cache."""
        again = request.num_preemptions > 0
        self._stats.record(request.num_tokens, cached, again)

    def make_prefix_cache_stats(self) -> PrefixCacheStats:
        """Hits since the last call."""
        stats, self._stats = self._stats, PrefixCacheStats()
        return stats

    def reset_prefix_cache(self) -> bool:
        """Forget the prefix cache; False if some request holds blocks."""
        done = self._reset()
        self._stats.reset = self._stats.reset or done
        return done
