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
``b_i < b``, leaves the others as they are, and has a moment of its own.  No peak exceeds the sum
of what each will hold at its end; while that is low enough, nothing needs to be sorted.

Cost, per scenario: O(n log n + n s) to build, O(n) for each candidate and for each that joins, in
a handful of vector operations; O(1) for a candidate that the sum of all ends answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from penstock.core.snapshot import Ints

_MOST = np.maximum.reduce


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

    __slots__ = ("_joined", "_size", "_sorted", "_steps", "_tokens", "_worst")

    def __init__(self, tokens: Ints, steps: Ints, block_size: int) -> None:
        self._tokens = tokens
        self._steps = steps
        self._size = block_size
        # Who joined before anything was sorted: tokens, and steps per scenario.
        self._joined: list[tuple[int, Sequence[int]]] = []
        self._sorted: list[Scenario] | None = None
        # The reductions of the ufuncs are half as dear as the methods of the same names.
        last = np.maximum.reduce(np.add.reduce(steps, axis=1))
        ends = int(np.add.reduce(tokens)) + int(last)
        self._worst = (ends + len(tokens) * (block_size - 1)) // block_size

    @property
    def peaks(self) -> list[int]:
        """Per scenario, in blocks."""
        return [scenario.peak for scenario in self._scenarios()]

    def at_most(self, tokens: int, steps: Sequence[int]) -> int:
        """A quick upper bound of the peaks if one more request joined."""
        return self._worst - (-(tokens + max(steps)) // self._size)

    def with_candidate(self, tokens: int, steps: Sequence[int]) -> list[int]:
        """The peaks if one more request joined; ``steps`` has a number per scenario."""
        return [
            scenario.joined_by(tokens, until)
            for scenario, until in zip(self._scenarios(), steps, strict=True)
        ]

    def add(self, tokens: int, steps: Sequence[int], worst: int) -> None:
        """Let it join; ``worst`` is what :meth:`at_most` or the largest peak was with it."""
        self._worst = worst
        if self._sorted is None:
            self._joined.append((tokens, steps))
            return
        for scenario, until in zip(self._sorted, steps, strict=True):
            scenario.join(tokens, until)

    def _scenarios(self) -> list[Scenario]:
        if self._sorted is None:
            tokens, steps = self._tokens, self._steps
            if self._joined:
                more = np.array([tokens for tokens, _ in self._joined], dtype=np.int64)
                further = np.array([steps for _, steps in self._joined], dtype=np.int64)
                tokens = np.concatenate((tokens, more))
                steps = np.concatenate((steps, further.T), axis=1)
            self._sorted = _sorted_scenarios(tokens, steps, self._size)
        return self._sorted


class Scenario:
    """One future: the module's rule worked out, in rows by steps descending.

    Args:
        size: tokens per block.
        negative: minus the steps of each row, so that it ascends.
        sums: sums of ``q`` up to each row.
        at_least: [n, s + 1], how many up to each row have a residue of x or more; None for
            blocks of one token.
        at_end: M of each row.
    """

    __slots__ = ("_asked", "_at_end", "_at_least", "_moments", "_negative", "_size", "_sums")

    def __init__(
        self,
        size: int,
        negative: Ints,
        sums: Ints,
        at_least: NDArray[np.int32] | None,
        at_end: Ints,
    ) -> None:
        self._size = size
        self._negative = negative
        self._sums = sums
        self._at_least = at_least
        self._at_end = at_end
        # Those who joined: tokens, steps, and the memory when each is about to end.
        self._moments: list[tuple[int, int, int]] = []
        # The last candidate asked about: tokens, steps, its place, memory at its end, and at the
        # ends of the rows from there on with it; it is the one that joins next, if any does.
        self._asked: tuple[int, int, int, int, Ints] | None = None

    @property
    def peak(self) -> int:
        """Its largest occupancy, in blocks."""
        worst = max([memory for _, _, memory in self._moments], default=0)
        return max(worst, int(_MOST(self._at_end))) if len(self._at_end) else worst

    def joined_by(self, tokens: int, until: int) -> int:
        """The peak with one more request, which runs for ``until`` steps."""
        size = self._size
        place, own, later = self._with(tokens, until)
        worst = own
        for _, other, memory in self._moments:
            more = -(-(tokens + other) // size) if other < until else 0
            worst = max(worst, memory + more)
        if place:
            worst = max(worst, int(_MOST(self._at_end[:place])))
        if len(later):
            worst = max(worst, int(_MOST(later)))
        return worst

    def join(self, tokens: int, until: int) -> None:
        """Let one more request in."""
        size = self._size
        place, own, later = self._with(tokens, until)
        self._asked = None
        self._at_end[place:] = later
        self._moments = [
            (a, b, memory - (-(tokens + b) // size) if b < until else memory)
            for a, b, memory in self._moments
        ]
        self._moments.append((tokens, until, own))

    def _with(self, tokens: int, until: int) -> tuple[int, int, Ints]:
        """A candidate's place, the memory at its end, and at the ends of the rows from there on."""
        if self._asked is not None and self._asked[:2] == (tokens, until):
            return self._asked[2:]
        size, place = self._size, int(self._negative.searchsorted(-until, side="right"))
        later: Ints = (tokens + size - 1) - self._negative[place:]
        if size > 1:
            later //= size
        later += self._at_end[place:]
        own = self._own(tokens, until, place)
        self._asked = (tokens, until, place, own, later)
        return place, own, later

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
                memory += int(self._at_least[place - 1, size - rest])
        return memory


def _sorted_scenarios(tokens: Ints, steps: Ints, size: int) -> list[Scenario]:
    scenarios, count = steps.shape
    negative = -steps
    order = negative.argsort(axis=1)
    # Plain offsets and take: indices in two axes cost more than the work at these sizes.
    row = np.arange(scenarios)[:, np.newaxis]
    negative = negative.take(order + row * count)
    alive = np.arange(1, count + 1)
    if size == 1:
        sums = (tokens - 1).take(order).cumsum(axis=1)
        at_end = sums + alive * (1 - negative)
        return [
            Scenario(1, ends, sums_, None, at_end_)
            for ends, sums_, at_end_ in zip(negative, sums, at_end, strict=True)
        ]
    held = tokens - 1
    quotient, rounds = held // size, -negative // size
    residue, rest = held - quotient * size, -negative - rounds * size
    sums = quotient.take(order).cumsum(axis=1)
    # Along the requests, so that a row of counts is added at a time.
    at_least = _at_least(size).take(residue.take(order), axis=0).cumsum(axis=1, dtype=np.int32)
    at_end = sums + alive * (rounds + 1)
    at_end += at_least.take((row * count + alive - 1) * (size + 1) + size - rest)
    return [Scenario(size, *parts) for parts in zip(negative, sums, at_least, at_end, strict=True)]


@lru_cache(maxsize=8)
def _at_least(size: int) -> NDArray[np.int32]:
    """[r, x]: 1 if r is x or more, for each residue r of a block size."""
    return np.tri(size, size + 1, dtype=np.int32)
