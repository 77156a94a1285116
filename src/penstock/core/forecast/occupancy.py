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

One more request that runs until ``b`` adds ``ceil((a + b_i) / s)`` to each ``M_i`` with
``b_i < b``, leaves the others as they are, and has a moment of its own: prefix sums, and maxima
from either end, answer that with one bisection.

Cost, per scenario: O(n log n + n s) to build, O(log n) for each candidate (O(n) where its
blocks and another's may be out of step by one just at the peak), O(n) to let it join.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.snapshot import Ints


def peak(tokens: Ints, steps: Ints, block_size: int = 1) -> int:
    """Peak blocks of requests that hold ``tokens`` and run for ``steps`` more steps."""
    return Occupancy(tokens, steps[np.newaxis], block_size).peaks[0]


class Occupancy:
    """Peak occupancy in several scenarios at once, growing candidate by candidate.

    Args:
        tokens: int64 [n], KV tokens held once the current step has run, at least 1.
        steps: int64 [scenarios, n], steps each goes on after the current one, at least 0.
        block_size: tokens per block.
    """

    __slots__ = ("_block_size", "_worst", "scenarios")

    def __init__(self, tokens: Ints, steps: Ints, block_size: int) -> None:
        self._block_size = block_size
        count = steps.shape[1]
        negative = -steps
        order = negative.argsort(axis=1)
        row = np.arange(len(steps))[:, np.newaxis]
        negative = negative[row, order]
        alive = np.arange(1, count + 1)
        rounds, rest = np.divmod(-negative, block_size)
        quotient, residue = np.divmod(tokens - 1, block_size)
        sums = quotient[order].cumsum(axis=1)
        at_end = sums + alive * (rounds + 1)
        at_least = None
        if block_size > 1:
            classes = np.arange(block_size + 1)[:, np.newaxis]
            at_least = (residue[order][:, np.newaxis] >= classes).cumsum(axis=2, dtype=np.int32)
            at_end += at_least[row, block_size - rest, alive - 1]
        ahead = at_end + rounds
        ahead += 1
        self.scenarios = [
            Scenario(
                block_size, negative[k], sums[k], None if at_least is None else at_least[k],
                rest[k], at_end[k], ahead[k],
            )
            for k in range(len(steps))
        ]  # fmt: skip
        self._worst = max(self.peaks)

    @property
    def peaks(self) -> list[int]:
        """Per scenario, in blocks."""
        return [scenario.peak for scenario in self.scenarios]

    def at_most(self, tokens: int, steps: Sequence[int]) -> int:
        """A quick upper bound of the peaks if one more request joined."""
        return self._worst - (-(tokens + max(steps)) // self._block_size)

    def with_candidate(self, tokens: int, steps: Sequence[int]) -> list[int]:
        """The peaks if one more request joined; ``steps`` has a number per scenario."""
        return [
            scenario.joined_by(tokens, until)
            for scenario, until in zip(self.scenarios, steps, strict=True)
        ]

    def add(self, tokens: int, steps: Sequence[int]) -> None:
        """Let it join."""
        for scenario, until in zip(self.scenarios, steps, strict=True):
            scenario.join(tokens, until)
        self._worst = max(self.peaks)


class Scenario:
    """One future: the module's rule worked out, in rows by steps descending.

    Attributes:
        peak: its largest occupancy, in blocks.

    Args:
        negative: minus the steps of each row, so that it ascends.
        sums: sums of ``q`` up to each row.
        at_least: [s + 1, n], how many up to each row have a residue of x or more.
        rest: ``R`` of each row.
        at_end: M of each row.
        ahead: M_i + Q_i + 1, to which a longer request adds its own ``q``, and perhaps 1.
    """

    __slots__ = (
        "_ahead", "_at_end", "_at_least", "_later", "_moments", "_negative", "_rest", "_size",
        "_sums", "_until_here", "peak",
    )  # fmt: skip

    def __init__(
        self, size: int, negative: Ints, sums: Ints, at_least: NDArray[np.int32] | None,
        rest: Ints, at_end: Ints, ahead: Ints,
    ) -> None:  # fmt: skip
        self._size = size
        self._negative = negative
        self._sums = sums
        self._at_least = at_least
        self._rest = rest
        self._at_end = at_end
        self._ahead = ahead
        # Those who joined: tokens, steps, and the memory when each is about to end.
        self._moments: list[tuple[int, int, int]] = []
        self._maxima()

    def joined_by(self, tokens: int, until: int) -> int:
        """The peak with one more request, which runs for ``until`` steps."""
        size, place = self._size, bisect_right(self._negative, -until)
        quotient, residue = divmod(tokens - 1, size)
        worst = self._own(tokens, until, place)
        if place:
            worst = max(worst, int(self._until_here[place - 1]))
        for _, other, memory in self._moments:
            more = -(-(tokens + other) // size) if other < until else 0
            worst = max(worst, memory + more)
        if place < len(self._ahead):
            ahead = int(self._later[place]) + quotient
            # One block more, perhaps, where the residues add up to a block.
            if residue and worst <= ahead:
                there = self._rest[place:] >= size - residue
                ahead = int((self._ahead[place:] + there).max()) + quotient
            worst = max(worst, ahead)
        return worst

    def join(self, tokens: int, until: int) -> None:
        """Let one more request in."""
        size, place = self._size, bisect_right(self._negative, -until)
        own = self._own(tokens, until, place)
        more = (tokens + size - 1 - self._negative[place:]) // size
        self._at_end[place:] += more
        self._ahead[place:] += more
        self._moments = [
            (a, b, memory - (-(tokens + b) // size) if b < until else memory)
            for a, b, memory in self._moments
        ]
        self._moments.append((tokens, until, own))
        self._maxima()

    def _own(self, tokens: int, until: int, place: int) -> int:
        """Memory when it is about to end itself, with those that do not end before."""
        size = self._size
        rounds, rest = divmod(until, size)
        memory = -(-(tokens + until) // size)
        for other, longer, _ in self._moments:
            if longer >= until:
                memory -= -(other + until) // size
        if place:
            memory += int(self._sums[place - 1]) + place * (rounds + 1)
            if rest and self._at_least is not None:
                memory += int(self._at_least[size - rest, place - 1])
        return memory

    def _maxima(self) -> None:
        self._until_here = np.maximum.accumulate(self._at_end)
        self._later = np.maximum.accumulate(self._ahead[::-1])[::-1]
        self.peak = max([memory for _, _, memory in self._moments], default=0)
        if len(self._until_here):
            self.peak = max(self.peak, int(self._until_here[-1]))
