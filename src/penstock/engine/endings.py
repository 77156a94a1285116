"""When a request ends by itself."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from penstock.core.engine import Work
from penstock.engine.rows import Ints

_NEVER = np.iinfo(np.int64).max


class Endings:
    """The ends of all started requests, told for a whole batch at once.

    A request with a trace length ends there and nowhere else.  Any other ends at the model's
    own end-of-sequence tokens, unless it ignores them, and at its stop tokens.

    Args:
        rows: how many requests may be started.
        vocab_size: output tokens are below this.
        eos_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, rows: int, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._is_eos = np.zeros(vocab_size, dtype=np.bool_)
        self._is_eos[[token for token in eos_ids if token < vocab_size]] = True
        self._last: Ints = np.zeros(rows, dtype=np.int64)
        self._heeds_eos = np.zeros(rows, dtype=np.bool_)
        self._has_stops = np.zeros(rows, dtype=np.bool_)
        self._stops: dict[int, frozenset[int]] = {}

    def start(self, row: int, work: Work) -> None:
        """Learn the rules of the request that has just got this row."""
        traced = work.trace_length is not None
        prompt = len(work.prompt)
        self._last[row] = _NEVER if work.trace_length is None else prompt + work.trace_length
        self._heeds_eos[row] = not (traced or work.sampling.ignore_eos)
        self._has_stops[row] = bool(work.sampling.stop_token_ids) and not traced
        self._stops[row] = frozenset(work.sampling.stop_token_ids)

    def ended(self, rows: Ints, tokens: Ints, total: Ints) -> npt.NDArray[np.bool_]:
        """Which of the requests end with these tokens.

        Args:
            rows: theirs.
            tokens: the newest token of each.
            total: tokens of each, the newest included.
        """
        ended = (total >= self._last[rows]) | (self._is_eos[tokens] & self._heeds_eos[rows])
        for index in np.flatnonzero(self._has_stops[rows]).tolist():
            ended[index] |= int(tokens[index]) in self._stops[int(rows[index])]
        return ended
