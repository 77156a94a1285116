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
``M_i = sum_{j<=i} ceil((a_j + b_i) / s)``.  Writing ``a_j = q_j s + r_j`` and
``b_i + s - 1 = Q_i s + R_i``, that is ``sum q_j + i Q_i + #{j <= i : r_j + R_i >= s}``, so
a sort and prefix sums still do.

What one more request changes is bounded without sorting anew.  The time until the last end is cut
into a few spans, each with the most that is held in it.  A request that goes on for ``b`` steps
adds at most ``ceil((a + min(b, end)) / s)`` in a span that it lives in, and the largest of these
sums is not exceeded.  At the moment of the peak it adds ``ceil((a + moment) / s)`` if it is still
there, and that is reached.  Before anything is sorted, the sum of what each will hold at its end is
a bound as well.  Only where the limit lies between the bounds are the requests sorted, the newcomer
among them.

Cost, per scenario: O(n log n + n s) to sort, in a handful of vector operations; O(1) for a
candidate that the bounds answer, which is most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from penstock.core.snapshot import Ints

_PARTS = (4, 12, 36)  # of the requests, on either side of the peak: where spans begin
_MANY = 32  # who joined: from here on arrays are quicker
_NEVER = 1 << 62
_TOKEN_BITS = 31
_MOST_TOKENS = (1 << _TOKEN_BITS) - 1
_LEAST_BITS = 8  # of a count, so that there are few tables


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

    __slots__ = ("_ends", "_joined", "_outlines", "_size", "_sorted", "_steps", "_tokens")

    def __init__(self, tokens: Ints, steps: Ints, block_size: int) -> None:
        self._tokens = tokens
        self._steps = steps
        self._size = block_size
        # Who joined and is not among these: tokens, and steps per scenario.
        self._joined: list[tuple[int, Sequence[int]]] = []
        self._sorted: _Sorted | None = None
        self._outlines: list[_Outline] | None = None
        # The reductions of the ufuncs are half as dear as the methods of the same names.
        ends: int = int(np.add.reduce(tokens)) + max(np.add.reduce(steps, axis=1).tolist())
        # Blocks if each held what it will hold at its end.
        self._ends = (ends + len(tokens) * (block_size - 1)) // block_size

    @property
    def peaks(self) -> list[int]:
        """Per scenario, in blocks."""
        return self._sort().peaks()

    def join_below(self, tokens: int, steps: Sequence[int], limit: float) -> int:
        """Let one more request in, if no scenario's peak reaches the limit with it.

        Args:
            steps: that it goes on after the current one, per scenario.
            limit: in blocks.

        Returns:
            below the limit, it joined, and no peak exceeds this; else it did not, and a peak is
            this large at least.
        """
        size = self._size
        if self._sorted is None:
            most = self._ends - (-(tokens + max(steps)) // size)
            if most < limit:
                self._ends = most
                self._joined.append((tokens, steps))
                return most
        else:
            outlines = self._outlines
            if outlines is None:
                outlines = [_outline(*rows) for rows in zip(*self._sorted, strict=True)]
                self._outlines = outlines
            more = tokens + size - 1
            most = least = 0
            for outline, until in zip(outlines, steps, strict=True):
                held, floor = outline.try_on(more, until, size)
                # Calls of max would cost half as much again.
                if held > most:  # noqa: PLR1730
                    most = held
                if floor > least:  # noqa: PLR1730
                    least = floor
            if most < limit:
                for outline in outlines:
                    outline.keep()
                self._joined.append((tokens, steps))
                return most
            if least >= limit:
                return least
        return self._join_exactly(tokens, steps, limit)

    def _join_exactly(self, tokens: int, steps: Sequence[int], limit: float) -> int:
        self._joined.append((tokens, steps))
        ordered = self._sort()
        worst = int(np.maximum.reduce(ordered.at_end, axis=None))
        if worst < limit:
            self._sorted, self._outlines = ordered, None
            if len(self._joined) > _MANY:
                self._take_in()
        else:
            self._joined.pop()
        return worst

    def _take_in(self) -> None:
        """Put those who joined into the arrays, so that they are not gone through each time."""
        tokens = [held for held, _ in self._joined]
        steps = np.array([ends for _, ends in self._joined], dtype=np.int64)
        self._tokens = np.concatenate((self._tokens, np.array(tokens, dtype=np.int64)))
        self._steps = np.concatenate((self._steps, steps.T), axis=1)
        self._joined.clear()

    def _sort(self) -> _Sorted:
        """Everyone, those who joined among them."""
        scenarios, count = self._steps.shape
        # Steps and tokens in one number: to sort numbers is cheaper than to find their order, and
        # then to put two arrays into it.
        rows = np.empty((scenarios, count + len(self._joined)), dtype=np.int64)
        first = rows[:, :count]
        np.left_shift(self._steps, _TOKEN_BITS, out=first)
        np.subtract(self._tokens, first, out=first)
        if self._joined:
            rows[:, count:] = [
                [held - (ends[scenario] << _TOKEN_BITS) for held, ends in self._joined]
                for scenario in range(scenarios)
            ]
        return _sort(rows, self._size)


class _Sorted(NamedTuple):
    """Everyone by steps descending, per scenario; [scenarios, n] each.

    Attributes:
        steps: that each goes on.
        at_end: blocks held when each is about to end.
    """

    steps: Ints
    at_end: Ints

    def peaks(self) -> list[int]:
        """Per scenario, in blocks."""
        if not self.at_end.shape[1]:
            return [0] * len(self.at_end)
        found: list[int] = np.maximum.reduce(self.at_end, axis=1).tolist()
        return found


class _Outline:
    """One scenario in spans of time, from the last to the first; steps and blocks.

    Args:
        spans: of which moments each is: above the first of a pair, up to the second.
        most: bounds of what is held in each.
        moment: of the peak.
        least: what is held at it.
    """

    __slots__ = ("_least", "_moment", "_most", "_spans", "_tried")

    def __init__(
        self, spans: list[tuple[int, int]], most: list[int], moment: int, least: int
    ) -> None:
        self._spans = spans
        self._most = most
        self._moment = moment
        self._least = least
        self._tried = most, least

    def try_on(self, more: int, until: int, size: int) -> tuple[int, int]:
        """Bounds of the peak with one more request, from above and from below.

        Args:
            more: what it holds after the current step, in tokens, rounded up to blocks once it
                is divided by their size.
            until: steps that it goes on.
        """
        tried = []
        for (after, end), held in zip(self._spans, self._most, strict=True):
            if after >= until:
                tried.append(held)
                continue
            # A call of min would cost as much as all else here.
            moment = end if end < until else until  # noqa: FURB136
            tried.append(held + (more + moment) // size)
        least = self._least
        if self._moment <= until:
            least += (more + self._moment) // size
        self._tried = tried, least
        return max(tried), least

    def keep(self) -> None:
        """The one that was tried on last has joined."""
        self._most, self._least = self._tried


def _outline(steps: Ints, at_end: Ints) -> _Outline:
    """Of one scenario's rows; the spans are narrow about the peak, and wide elsewhere."""
    count, peak_row = len(steps), int(at_end.argmax())
    parts = [count // part for part in _PARTS]
    near = {0, peak_row, *[peak_row - part for part in parts], *[peak_row + part for part in parts]}
    first = np.array(sorted([row for row in near if 0 <= row < count]))
    most = np.maximum.reduceat(at_end, first).tolist()
    ends = steps.take(first).tolist()
    # After the last end there is nobody; a newcomer may be.
    spans = list(zip([*ends, -1], [_NEVER, *ends], strict=True))
    return _Outline(spans, [0, *most], steps.item(peak_row), at_end.item(peak_row))


def _sort(rows: Ints, size: int) -> _Sorted:
    """Of one number for each request: its tokens, less its steps times a large number."""
    count = rows.shape[1]
    rows.sort(axis=1)
    ago = rows >> _TOKEN_BITS
    until, held = -ago, rows & _MOST_TOKENS
    alive = _counting(count + 1)[1:]
    if size == 1:
        at_end = np.add.accumulate(held, axis=1)
        at_end += alive * until
        return _Sorted(until, at_end)
    up = (size - 1) - ago
    if size & (size - 1):
        quotient, rounds = held // size, up // size
        residue, rest = held - quotient * size, up - rounds * size
    else:
        shift = size.bit_length() - 1
        quotient, rounds = held >> shift, up >> shift
        residue, rest = held & (size - 1), up & (size - 1)
    at_end = np.add.accumulate(quotient, axis=1)
    rounds *= alive
    at_end += rounds
    at_end += _carries(residue, rest, size)
    return _Sorted(until, at_end)


def _carries(residue: Ints, rest: Ints, size: int) -> Ints:
    """How many residues up to each place make a block more together with the rest there."""
    scenarios, count = residue.shape
    bits = max(_LEAST_BITS, count.bit_length())
    table, word_of, shift_of = _carry_tables(size, bits)
    words = np.add.accumulate(table.take(residue, axis=1), axis=2)
    place = word_of.take(rest)
    place *= scenarios * count
    place += _counting(scenarios * count).reshape(scenarios, count)
    counts = words.take(place)
    counts >>= shift_of.take(rest)
    counts &= (1 << bits) - 1
    return counts


@lru_cache(maxsize=64)
def _carry_tables(size: int, bits: int) -> tuple[Ints, Ints, Ints]:
    """[w, r]: a field of so many bits for each rest: 1 if residue and rest are a block or more.

    A few counts are kept in one number, so that there are fewer numbers to sum up.  The other
    tables say for each rest in which number its field is, and from which bit on.
    """
    per_word = 64 // bits
    table = np.zeros((-(-size // per_word), size), dtype=np.int64)
    word_of, field_of = np.divmod(np.arange(size), per_word)
    shift_of = field_of * bits
    for rest in range(size):
        table[word_of[rest], size - rest :] += 1 << shift_of[rest]
    return table, word_of, shift_of


@lru_cache(maxsize=64)
def _counting(count: int) -> Ints:
    """0, 1, and so on; not to be written to."""
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers
