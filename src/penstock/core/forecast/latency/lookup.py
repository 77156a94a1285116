"""A table of decode step times with running means, and a running prompt rate.

Problem: a scheduler that packs decode batches by slack asks for a step's time at every request.
Source: Kairos (arXiv 2605.02329): ``LUT[batch size, longest sequence]``, profiled once, each cell
the mean of 100 runs, and brought up to date after each step as the mean of all that was seen;
prefill by one rate in tokens per second.
Rule: axes are ascending batch sizes and lengths.  A measured step goes to the nearest cell, by
ratio; a question is answered between the four cells around it, linearly in both, and beyond the
table by its rim.
Limits: the longest sequence stands for all, so mixed batches are overestimated; one rate for
prompts knows nothing of attention's square.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from penstock.core.forecast.latency.base import StepLoad

_PROFILED = 100  # runs behind a cell of the profile


class LookUpTable:
    """Decode steps by batch size and longest context, prompts by a rate.

    Args:
        cells: seconds of a decode step by (batch size, longest context); a whole grid.
        prefill_rate: prompt tokens per second.
        weight: steps that each given cell, and each second of the rate, counts for.

    Raises:
        ValueError: the cells are no grid, or a number is not above 0.
    """

    wants_longest = True

    def __init__(
        self,
        cells: Mapping[tuple[int, int], float],
        prefill_rate: float,
        weight: int = _PROFILED,
    ) -> None:
        self._batches = sorted({batch for batch, _ in cells})
        self._lengths = sorted({length for _, length in cells})
        missing = [
            (batch, length)
            for batch in self._batches
            for length in self._lengths
            if (batch, length) not in cells
        ]
        if not cells or missing:
            msg = f"cells has {len(cells)} cells, none for {missing[:1]}; it must be a whole grid"
            raise ValueError(msg)
        for name, value in (*cells.items(), ("prefill_rate", prefill_rate), ("weight", weight)):
            if not value > 0:
                msg = f"{name} is {value}; it must be above 0"
                raise ValueError(msg)
        self._means = dict(cells)
        self._counts = dict.fromkeys(cells, weight)
        self._tokens = prefill_rate * weight
        self._spent = float(weight)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self._tokens / self._spent

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that only decoded or only computed prompts; others tell nothing."""
        if load.decoding and not load.prefill:
            longest = load.longest or load.context // load.decoding
            cell = (_nearest(self._batches, load.decoding), _nearest(self._lengths, longest))
            count = self._counts[cell] = self._counts[cell] + 1
            self._means[cell] += (seconds - self._means[cell]) / count
        elif load.prefill and not load.decoding:
            self._tokens += load.prefill
            self._spent += seconds

    def step(self, batch: int, longest: float) -> float:
        """Seconds of a decode step."""
        low_batch, high_batch, share = _around(self._batches, batch)
        low, high, part = _around(self._lengths, longest)

        def at(row: int) -> float:
            return (1 - part) * self._means[row, low] + part * self._means[row, high]

        return (1 - share) * at(low_batch) + share * at(high_batch)

    def seconds(self, load: StepLoad) -> float:
        """The decode step and the prompts, one after the other."""
        total = load.prefill / self.prefill_rate
        if load.decoding:
            total += self.step(load.decoding, load.longest or load.context / load.decoding)
        return total

    def decode_line(self, decoding: int) -> None:
        """It follows the longest context, not their sum."""
        del decoding


def _around(axis: Sequence[int], place: float) -> tuple[int, int, float]:
    """The neighbours on an axis, and how far towards the second."""
    if place <= axis[0] or len(axis) == 1:
        return axis[0], axis[0], 0.0
    if place >= axis[-1]:
        return axis[-1], axis[-1], 0.0
    right = bisect_right(axis, place)
    low, high = axis[right - 1], axis[right]
    return low, high, (place - low) / (high - low)


def _nearest(axis: Sequence[int], place: float) -> int:
    for low, high in pairwise(axis):
        if place * place < low * high:
            return low
    return axis[-1]
