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
Where caps do not bind (studies in which true lengths exceed what policies are told), nothing
is cut at the cap, and the last knot is the larger of the cap and the longest past length.

Limits: assumes that the near future resembles the near past; lengths cut by the cap
count like those that ended by themselves; all classes of requests share one histogram.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

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
        # 0, then the lengths ascending, then space: see draw_running.
        self._sorted = np.full(window + 2, first, dtype=np.int64)
        self._sorted[0] = 0
        # [g]: how many are at most g, as far as anyone asked: a table is quicker than a search.
        self._ranks = np.zeros(0, dtype=np.int64)

    def observe(self, length: int) -> None:
        """Add an output length, forgetting the oldest if the window is full."""
        count = len(self._lengths)
        past = self._sorted[1:]
        place = int(past[:count].searchsorted(length))
        if count == self._window:
            oldest = self._lengths.popleft()
            self._ranks[length:oldest] += 1
            self._ranks[oldest:length] -= 1
            gone = int(past[:count].searchsorted(oldest))
            # Only what lies between the two places moves.
            if gone < place:
                place -= 1
                past[gone:place] = past[gone + 1 : place + 1]
            else:
                past[place + 1 : gone + 1] = past[place:gone]
        else:
            self._ranks[length:] += 1
            past[place + 1 : count + 1] = past[place:count]
        past[place] = length
        self._lengths.append(length)

    def sorted_lengths(self) -> Ints:
        """The window in ascending order, as it is until the next end."""
        return self._sorted[1 : len(self._lengths) + 1]

    def draw_new(
        self, uniform: Sequence[float], cap: int, had: int = 0, *, binding: bool = True
    ) -> list[int]:
        """What is left of uniformly chosen past lengths, cut at ``cap``, for one about to run.

        Args:
            uniform: numbers in [0, 1), one per draw.
            had: output tokens that it will have after its next step: what is left comes after them.
            binding: whether the cap binds.
        """
        count, item = len(self._lengths), self._sorted.item
        drawn = []
        for x in uniform:
            length = item(int(x * count) + 1)
            # Calls of min and max would cost as much as all else here.
            if binding and length > cap:
                length = cap
            drawn.append(length - had if length > had else 0)
        return drawn

    def draw_running(
        self, uniform: NDArray[np.float64], generated: Ints, cap: Ints, *, binding: bool = True
    ) -> Ints:
        """Lengths for running requests, given what each has generated.

        Args:
            uniform: numbers in [0, 1), shape [..., n].
            generated: int64 [n].
            cap: int64 [n].
            binding: whether the caps bind.

        Returns:
            int64 [..., n], each at least ``generated`` and, if caps bind, at most the cap.
        """
        count, knots = len(self._lengths), self._sorted
        longest = knots.item(count)
        if not len(generated):
            return uniform.astype(np.int64)
        first = self._up_to(generated)
        # The cap as one more knot: if larger than all others, or in any case.
        always = not binding or longest < np.minimum.reduce(cap)
        tail = 1 if always else longest < cap
        position = uniform * ((count + tail) - first)
        place = position.astype(np.int64)
        position -= place
        place += first
        # knots[place] is the past length before place; below g only before the first knot.
        low = knots.take(place)
        np.maximum(low, generated, out=low)
        high = knots[1:].take(place)
        last = cap if binding else np.maximum(cap, longest)
        # Beyond the longest there is only the cap.
        np.copyto(high, last, where=place >= count)
        high -= low
        position *= high
        position += low
        # Rounding cannot leave [low, high].
        drawn: Ints = np.rint(position, out=position).astype(np.int64)
        if not always:
            np.minimum(drawn, cap, out=drawn)
        return drawn

    def _up_to(self, generated: Ints) -> Ints:
        """How many past lengths do not exceed each of these."""
        try:
            return self._ranks.take(generated)
        except IndexError:
            size = 2 * int(generated.max()) + 1
            self._ranks = self.sorted_lengths().searchsorted(np.arange(size), side="right")
            return self._ranks.take(generated)
