from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.entry import Entry
from penstock.core.prompt_table import PromptTable, rows_of
from penstock.core.types import SLO, Request


def entry(seq: int, ttft: float | None = None) -> Entry:
    request = Request(str(seq), seq + 1, 9, seq / 2, slo=SLO(ttft=ttft), computed=seq % 2)
    made = Entry(request, seq, (), 0.0)
    made.generated, made.demoted = seq % 3, seq % 5 == 0
    return made


@given(st.lists(st.integers(0, 150), max_size=600))
def test_rows_are_those_who_joined_and_have_not_left_in_that_order(toggled: list[int]) -> None:
    table = PromptTable()
    there: dict[int, Entry] = {}
    for seq in toggled:
        if seq in there:
            table.leave(there.pop(seq))
        else:
            there[seq] = entry(seq, None if seq % 4 else 2.0)
            table.join(there[seq])
    rows, naive = table.rows(), rows_of(list(there.values()))
    assert rows.entries == naive.entries == list(there.values())
    assert np.array_equal(rows.numbers, naive.numbers)
    assert np.array_equal(rows.times, naive.times)


def test_what_the_columns_say() -> None:
    rows = rows_of([entry(5), entry(8, 2.0)])
    assert rows.numbers.tolist() == [[5, 8], [8, 11], [1, 0], [2, 2], [1, 0]]
    assert rows.times.tolist() == [[2.5, 4.0], [math.inf, 2.0]]
    assert rows_of([]).numbers.shape == (5, 0)
    assert rows_of([]).times.shape == (2, 0)


def test_rows_do_not_move_when_others_join() -> None:
    """A policy may keep what it was shown."""
    table = PromptTable()
    table.join(entry(1))
    before = table.rows()
    for seq in range(2, 300):
        table.join(entry(seq))
    assert before.numbers[0].tolist() == [1]


def test_who_comes_and_goes_leaves_no_room_behind() -> None:
    table = PromptTable()
    for seq in range(10_000):
        one = entry(seq)
        table.join(one)
        if seq:
            table.leave(one)
    assert len(table.rows().entries) == 1
    assert table._numbers.shape[1] == 64
