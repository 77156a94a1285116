"""Those that wait as columns, for orders that are made anew before every step.

Whatever an order looks at stays as it is while a request waits.  So a row is written when it joins
and struck out when it leaves; a step costs a few gathers instead of a visit to each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from penstock.core.entry import Entry
from penstock.core.snapshot import Floats, Ints

_FIRST_ROOM = 64


class Rows(NamedTuple):
    """Some entries, and the columns that :class:`~penstock.core.snapshot.Prompts` is made of.

    Attributes:
        entries: one for each row.
        numbers: int64, rows of ``seq``, tokens, tokens with KV, output tokens, demoted.
        times: float64, rows of arrival and TTFT.
    """

    entries: list[Entry]
    numbers: Ints
    times: Floats


class PromptTable:
    """Joining and leaving take constant time, amortized; rows are in the order of joining."""

    def __init__(self) -> None:
        self._entries: list[Entry | None] = []
        self._rows: dict[int, int] = {}
        self._numbers: Ints = np.zeros((5, _FIRST_ROOM), dtype=np.int64)
        self._times: Floats = np.zeros((2, _FIRST_ROOM), dtype=np.float64)

    def join(self, entry: Entry) -> None:
        """One waits from now on; it is not in the table."""
        row = len(self._entries)
        if row == self._numbers.shape[1]:
            self._make_room()
            row = len(self._entries)
        self._entries.append(entry)
        self._rows[entry.seq] = row
        numbers, times = _columns([entry])
        self._numbers[:, row], self._times[:, row] = numbers[:, 0], times[:, 0]

    def leave(self, entry: Entry) -> None:
        """It waits no more."""
        self._entries[self._rows.pop(entry.seq)] = None

    def rows(self) -> Rows:
        """Those that wait."""
        there = np.fromiter(self._rows.values(), dtype=np.int64, count=len(self._rows))
        return Rows(
            [entry for entry in self._entries if entry is not None],
            self._numbers[:, there],
            self._times[:, there],
        )

    def _make_room(self) -> None:
        """Strike out who has left; twice the room if that is not enough."""
        entries, numbers, times = self.rows()
        room = self._numbers.shape[1]
        while 2 * len(entries) > room:
            room *= 2
        self._entries = list(entries)
        self._rows = {entry.seq: row for row, entry in enumerate(entries)}
        self._numbers = np.zeros((5, room), dtype=np.int64)
        self._times = np.zeros((2, room), dtype=np.float64)
        self._numbers[:, : len(entries)] = numbers
        self._times[:, : len(entries)] = times


def rows_of(entries: list[Entry]) -> Rows:
    """Those in prefill, whose columns change from step to step."""
    return Rows(entries, *_columns(entries))


def _columns(entries: list[Entry]) -> tuple[Ints, Floats]:
    numbers = [(e.seq, e.total, e.computed or e.imported, e.generated, e.demoted) for e in entries]
    promised = [e.request.slo.ttft for e in entries]
    times = [
        (e.request.arrival, math.inf if ttft is None else ttft)
        for e, ttft in zip(entries, promised, strict=True)
    ]
    shape = np.array(numbers, dtype=np.int64).reshape(-1, 5)
    return shape.T, np.array(times, dtype=np.float64).reshape(-1, 2).T
