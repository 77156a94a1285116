"""Moves: only for a gain, one from and to each instance, and not before a slice has passed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.lengths import LengthHistory
from penstock.core.policies.move.by_gain import ByGain, Stay

MODEL = Bilinear((1e-4, 0.0, 0.0, 1e-2), (1e-6, 1e-3, 0.0, 1e-2))


def policy(slice_tokens: int = 32, least: float = 0.0) -> ByGain:
    history = LengthHistory(100)
    for _ in range(200):
        history.observe(500)
    return ByGain(history, slice_tokens, least)


def stay(name: str, generated: int = 100, fresh: int = 100, prompt: int = 100) -> Stay:
    return Stay(name, prompt, generated, 1000, fresh)


def test_who_gains_moves_from_the_crowded_to_the_empty() -> None:
    crowd = [stay(f"s{index}") for index in range(30)]
    (move,) = policy().moves([crowd, []], MODEL)
    assert (move.source, move.target) == (0, 1)
    assert policy().moves([[], crowd], MODEL)[0][1:] == (1, 0)


def test_nobody_moves_before_its_slice_has_passed_unless_it_has_nothing_yet() -> None:
    young = [stay(f"s{index}", fresh=31) for index in range(30)]
    assert policy().moves([young, []], MODEL) == []
    waiting = [*young, stay("new", generated=0, fresh=0)]
    assert [move.slice_id for move in policy().moves([waiting, []], MODEL)] == ["new"]


def test_a_move_must_pay_for_what_is_computed_again() -> None:
    # 28 ms a step less for 400 steps is 11 s; 200,000 tokens again take 20 s.
    heavy = [stay(f"s{index}", prompt=200_000 if index == 0 else 1) for index in range(30)]
    names = {move.slice_id for move in policy().moves([heavy, []], MODEL)}
    assert "s0" not in names
    assert policy(least=1e9).moves([heavy, []], MODEL) == []


def test_equal_instances_are_left_alone() -> None:
    one = [stay(f"a{index}") for index in range(10)]
    two = [stay(f"b{index}") for index in range(10)]
    assert policy().moves([one, two], MODEL) == []
    assert policy().moves([one], MODEL) == []


stays = st.lists(
    st.tuples(st.integers(1, 900), st.integers(0, 400), st.integers(0, 400)), max_size=12
)


@given(st.lists(stays, max_size=6))
def test_each_instance_gives_or_takes_at_most_one(
    fleet: list[list[tuple[int, int, int]]],
) -> None:
    named = [
        [
            Stay(f"{number}-{index}", prompt, generated, 1000, min(fresh, generated))
            for index, (prompt, generated, fresh) in enumerate(rows)
        ]
        for number, rows in enumerate(fleet)
    ]
    moves = policy().moves(named, MODEL)
    touched = [index for move in moves for index in (move.source, move.target)]
    assert len(touched) == len(set(touched))
    for move in moves:
        assert move.slice_id.startswith(f"{move.source}-")
