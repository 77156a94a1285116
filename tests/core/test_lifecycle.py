"""The legal moves, written out a second time, and nothing else."""

from __future__ import annotations

from itertools import product

import pytest

from penstock.core.entry import Entry
from penstock.core.lifecycle import MOVES, IllegalMoveError, State
from penstock.core.types import Request

LEGAL = {
    "waiting prefill",
    "waiting ended",
    "prefill decode",
    "prefill evicted",
    "prefill draining",
    "prefill ended",
    "decode evicted",
    "decode draining",
    "decode ended",
    "evicted prefill",
    "evicted ended",
    "draining ended",
}


@pytest.mark.parametrize(("old", "new"), list(product(State, State)))
def test_moves(old: State, new: State) -> None:
    entry = Entry(Request("a", 5, 9, 0.0), 0, (), 0.0, state=old)
    if f"{old} {new}" in LEGAL:
        entry.move(new)
        assert entry.state is new
    else:
        with pytest.raises(IllegalMoveError, match=f"request a: illegal move {old} -> {new}"):
            entry.move(new)
        assert entry.state is old


def test_every_state_can_come_to_its_end() -> None:
    assert MOVES.keys() == set(State)
    for state in set(State) - {State.ENDED}:
        assert State.ENDED in MOVES[state]
    assert not MOVES[State.ENDED]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        MOVES[State.ENDED] = frozenset({State.WAITING})  # type: ignore[index]
