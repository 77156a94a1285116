"""The past: output lengths of requests that ended lately, as a distribution to draw from.

Problem: nobody knows how long an answer will be, and a learned predictor costs time and
ages.

Source: Past-Future (arXiv 2507.10150), section 3.2: the output lengths of adjacent
windows of about 1,000 requests are distributed alike; the authors' artifact for the
details that the paper leaves open.

Rule: keep the last ``window`` output lengths.  A request that has not run draws one of
them.  A request that has generated ``g`` tokens draws from the lengths above ``g``, by
linear interpolation between the knots ``g``, the lengths strictly greater, and its cap
if that is larger than all of them.  No draw exceeds the cap or falls below ``g``.

Limits: assumes that the near future resembles the near past; lengths cut by the cap
count like those that ended by themselves; all classes of requests share one histogram.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from penstock.core.snapshot import Ints

_BEYOND_ANY_CAP = np.iinfo(np.int32).max


class LengthHistory:
    """A window of output lengths.

    Args:
        window: how many are kept.
        cold_start: length with which half of the window is filled at first;
            None stands for "as long as the cap allows", whatever the request's cap is.
    """

    def __init__(self, window: int, cold_start: int | None = None) -> None:
        if window < 2:
            msg = f"window is {window}; it must be at least 2"
            raise ValueError(msg)
        if cold_start is not None and cold_start < 1:
            msg = f"cold_start is {cold_start}; it must be at least 1 token"
            raise ValueError(msg)
        first = _BEYOND_ANY_CAP if cold_start is None else cold_start
        self._window = window
        self._lengths: deque[int] = deque([first] * (window // 2))
        # Ascending, in the first len(_lengths) places.
        self._sorted = np.full(window, first, dtype=np.int64)

    def observe(self, length: int) -> None:
        """Add an output length, forgetting the oldest if the window is full."""
        count = len(self._lengths)
        if count == self._window:
            gone = int(np.searchsorted(self._sorted, self._lengths.popleft()))
            self._sorted[gone:-1] = self._sorted[gone + 1 :]
            count -= 1
        place = int(np.searchsorted(self._sorted[:count], length))
        self._sorted[place + 1 : count + 1] = self._sorted[place:count]
        self._sorted[place] = length
        self._lengths.append(length)

    def sorted_lengths(self) -> Ints:
        """The window in ascending order, as it is until the next end."""
        return self._sorted[: len(self._lengths)]

    def draw_new(self, uniform: NDArray[np.float64], cap: int) -> Ints:
        """Lengths for requests that have not run: a uniformly chosen past length, at most ``cap``.

        Args:
            uniform: numbers in [0, 1), one per draw.
        """
        past = self.sorted_lengths()
        drawn: Ints = past[(uniform * len(past)).astype(np.int64)]
        capped: Ints = np.minimum(drawn, cap)
        return capped

    def draw_running(self, uniform: NDArray[np.float64], generated: Ints, cap: Ints) -> Ints:
        """Lengths for running requests, given what each has generated.

        Args:
            uniform: numbers in [0, 1), shape [..., n].
            generated: int64 [n].
            cap: int64 [n].

        Returns:
            int64 [..., n], each in [generated, cap].
        """
        past = self.sorted_lengths()
        first = np.searchsorted(past, generated, side="right")
        above = len(past) - first
        with_cap = past[-1] < cap
        position = uniform * (above + with_cap)
        knot = position.astype(np.int64)
        last = len(past) - 1
        place = first + knot
        low = np.where(knot == 0, generated, past[np.maximum(place - 1, 0)])
        high = np.where(knot < above, past[np.minimum(place, last)], cap)
        drawn = np.rint(low + (high - low) * (position - knot)).astype(np.int64)
        within: Ints = np.minimum(np.maximum(drawn, generated), cap)
        return within
