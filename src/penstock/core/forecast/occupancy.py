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

Cost: O(n log n + n s) to build, O(n) for each candidate.
"""

from __future__ import annotations

import numpy as np

from penstock.core.snapshot import Ints


def peak(tokens: Ints, steps: Ints, block_size: int = 1) -> int:
    """Peak blocks of requests that hold ``tokens`` and run for ``steps`` more steps."""
    return Occupancy(tokens, steps, block_size).peak


class Occupancy:
    """Peak occupancy that grows candidate by candidate.

    Args:
        tokens: int64 [n], KV tokens held once the current step has run, at least 1.
        steps: int64 [n], steps each goes on after the current one, at least 0.
        block_size: tokens per block.
    """

    __slots__ = ("_at_end", "_block_size", "_steps", "_tokens", "peak")

    def __init__(self, tokens: Ints, steps: Ints, block_size: int) -> None:
        order = np.argsort(-steps, kind="stable")
        self._tokens = tokens[order]
        self._steps = steps[order]
        self._block_size = block_size
        self._at_end = _at_ends(self._tokens, self._steps, block_size)
        self.peak = int(self._at_end.max(initial=0))

    def with_candidate(self, tokens: int, steps: int) -> int:
        """The peak if one more request joined."""
        before, own, rest = self._joined(tokens, steps)
        return max(int(before.max(initial=0)), own, int(rest.max(initial=0)))

    def add(self, tokens: int, steps: int) -> None:
        """Let it join."""
        before, own, rest = self._joined(tokens, steps)
        at = len(before)
        self._at_end = np.concatenate((before, [own], rest))
        self._tokens = np.insert(self._tokens, at, tokens)
        self._steps = np.insert(self._steps, at, steps)
        self.peak = int(self._at_end.max())

    def _joined(self, tokens: int, steps: int) -> tuple[Ints, int, Ints]:
        """Memory at the ends before the candidate's row, at its own end, and at those after."""
        size = self._block_size
        # Rows that run at least as long as the candidate come first: they are there at its end.
        at = int(np.searchsorted(-self._steps, -steps, side="right"))
        own = _ceil_sum(self._tokens[:at] + steps, size) + -(-(tokens + steps) // size)
        rest = self._at_end[at:] - (-(tokens + self._steps[at:]) // size)
        return self._at_end[:at], own, rest


def _ceil_sum(tokens: Ints, size: int) -> int:
    return int(np.sum(-(-tokens // size)))


def _at_ends(tokens: Ints, steps: Ints, size: int) -> Ints:
    """M_i of the module's rule, for rows sorted by ``steps`` descending."""
    count = len(tokens)
    alive = np.arange(1, count + 1)
    if size == 1:
        return np.cumsum(tokens) + alive * steps
    quotient, residue = np.divmod(tokens - 1, size)
    rounds, rest = np.divmod(steps, size)
    seen = np.zeros((count, size + 1), dtype=np.int64)
    seen[np.arange(count), residue] = 1
    # at_least[i, x]: rows up to i whose residue is x or more; column ``size`` is empty.
    at_least = np.cumsum(seen, axis=0)[:, ::-1].cumsum(axis=1)[:, ::-1]
    carried = at_least[np.arange(count), size - rest]
    result: Ints = np.cumsum(quotient) + alive * (rounds + 1) + carried
    return result
