"""The future: the exact peak KV occupancy of requests whose remaining lengths are known.

Problem: requests of a batch end at different times, so the memory it will need is
neither what it holds now nor the sum of what each will hold at its end.

Source: Past-Future (arXiv 2507.10150), section 3.3, equations 2 to 4; LightLLM's router
documentation.

Rule: every running request adds one token per step and gives all of it back when it
ends, so memory can only peak just before an end.  With ``a`` tokens after the current
step and ``b`` further steps each, sorted by ``b`` descending, the memory when the
i-th is about to end is ``M_i = sum_{j<=i} a_j + i * b_i``, and the peak is their maximum.
With blocks of ``s`` tokens each term is rounded up by itself:
``M_i = sum_{j<=i} ceil((a_j + b_i) / s)``.  Writing ``a_j - 1 = q_j s + r_j`` and
``b_i = Q_i s + R_i``, that is ``sum q_j + i (Q_i + 1) + #{j <= i : r_j >= s - R_i}``, so
a sort and prefix sums still do.

Cost, per scenario: O(n log n + n s) to build, O(n) for each candidate.
"""

from __future__ import annotations

import numpy as np

from penstock.core.snapshot import Ints


def peak(tokens: Ints, steps: Ints, block_size: int = 1) -> int:
    """Peak blocks of requests that hold ``tokens`` and run for ``steps`` more steps."""
    return int(Occupancy(tokens, steps[np.newaxis], block_size).peaks[0])


class Occupancy:
    """Peak occupancy in several scenarios at once, growing candidate by candidate.

    Args:
        tokens: int64 [n], KV tokens held once the current step has run, at least 1.
        steps: int64 [scenarios, n], steps each goes on after the current one, at least 0.
        block_size: tokens per block.
    """

    __slots__ = ("_at_end", "_block_size", "_steps", "_tokens")

    def __init__(self, tokens: Ints, steps: Ints, block_size: int) -> None:
        order = np.argsort(-steps, axis=1, kind="stable")
        self._tokens = tokens[order]
        # Plain indices: the along-axis helpers cost more than the work at these sizes.
        self._steps = steps[np.arange(len(steps))[:, np.newaxis], order]
        self._block_size = block_size
        self._at_end = _at_ends(self._tokens, self._steps, block_size)

    @property
    def peaks(self) -> Ints:
        """Int64 [scenarios], in blocks."""
        peaks: Ints = self._at_end.max(axis=1, initial=0)
        return peaks

    def with_candidate(self, tokens: int, steps: Ints) -> Ints:
        """The peaks if one more request joined; ``steps`` is int64 [scenarios]."""
        at_end, own = self._joined(tokens, steps)
        peaks: Ints = np.maximum(at_end.max(axis=1, initial=0), own)
        return peaks

    def add(self, tokens: int, steps: Ints) -> None:
        """Let it join."""
        at_end, own = self._joined(tokens, steps)
        self._at_end = np.concatenate((at_end, own[:, np.newaxis]), axis=1)
        self._tokens = np.concatenate(
            (self._tokens, np.full_like(own, tokens)[:, np.newaxis]), axis=1
        )
        self._steps = np.concatenate((self._steps, steps[:, np.newaxis]), axis=1)

    def _joined(self, tokens: int, steps: Ints) -> tuple[Ints, Ints]:
        """Memory when each of the others is about to end, and when the candidate is."""
        size = self._block_size
        until = steps[:, np.newaxis]
        outlives = self._steps >= until
        there = np.where(outlives, -(-(self._tokens + until) // size), 0)
        own = there.sum(axis=1) - (-(tokens + steps) // size)
        more = np.where(outlives, 0, -(-(tokens + self._steps) // size))
        return self._at_end + more, own


def _at_ends(tokens: Ints, steps: Ints, size: int) -> Ints:
    """M_i of the module's rule, for columns sorted by ``steps`` descending."""
    scenarios, count = steps.shape
    alive: Ints = np.arange(1, count + 1, dtype=np.int64)
    if size == 1:
        exact: Ints = np.cumsum(tokens, axis=1) + alive * steps
        return exact
    quotient, residue = np.divmod(tokens - 1, size)
    rounds, rest = np.divmod(steps, size)
    seen = np.zeros((scenarios, count, size + 1), dtype=np.int32)
    rows, columns = np.arange(scenarios)[:, np.newaxis], alive - 1
    seen[rows, columns, residue] = 1
    # at_least[k, i, x]: columns up to i whose residue is x or more; x = size is always empty.
    at_least = seen.cumsum(axis=1, dtype=np.int32)[..., ::-1]
    at_least = at_least.cumsum(axis=2, dtype=np.int32)[..., ::-1]
    carried = at_least[rows, columns, size - rest]
    result: Ints = np.cumsum(quotient, axis=1) + alive * (rounds + 1) + carried
    return result
