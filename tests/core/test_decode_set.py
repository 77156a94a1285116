"""The decode set, which touches nobody per tick, against counting each one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.entry import DecodeSet, Entry
from penstock.core.memory import blocks_for
from penstock.core.types import Request


@dataclass
class Naive:
    """One member, counted by hand."""

    entry: Entry
    generated: int

    @property
    def kv(self) -> int:
        """Tokens that have KV: the newest one's is computed in the next step."""
        return self.entry.request.prompt_tokens + self.generated - 1


def member(members: DecodeSet, seq: int, prompt: int, generated: int, cap: int) -> Naive:
    """A request whose chunk has just sampled its ``generated``-th token."""
    entry = Entry(Request(str(seq), prompt, cap, 0.0), seq, (0.0,), 0.0)
    entry.generated = generated
    entry.base = generated - members.ticks
    entry.holding.private = blocks_for(prompt + generated - 1, members._block_size)
    return Naive(entry, generated)


@given(st.sampled_from([1, 2, 3, 4, 16]), st.data())
@settings(max_examples=60)
def test_it_counts_as_one_by_one(block_size: int, data: st.DataObject) -> None:
    members = DecodeSet(block_size)
    naive: dict[str, Naive] = {}
    for seq in range(data.draw(st.integers(1, 60))):
        move = data.draw(st.sampled_from(["join", "join", "tick", "tick", "leave"]))
        if move == "join":
            generated = data.draw(st.integers(1, 9))
            one = member(
                members,
                seq,
                data.draw(st.integers(1, 40)),
                generated,
                generated + data.draw(st.integers(1, 12)),
            )
            members.join([one.entry])
            naive[str(seq)] = one
        elif move == "leave" and naive:
            one = naive.pop(data.draw(st.sampled_from(sorted(naive))))
            leave(members, one, block_size)
        elif move == "tick":
            for one in naive.values():
                one.generated += 1
            capped = members.tick()
            assert {each.request.id for each in capped} == {
                name for name, one in naive.items() if one.generated == one.entry.request.cap
            }
            for each in capped:
                leave(members, naive.pop(each.request.id), block_size)
        agree(members, naive, block_size)


def leave(members: DecodeSet, one: Naive, block_size: int) -> None:
    members.leave(one.entry)
    assert one.entry.generated == one.generated
    assert one.entry.computed == one.kv
    assert one.entry.holding.private == blocks_for(one.kv, block_size)


def agree(members: DecodeSet, naive: dict[str, Naive], block_size: int) -> None:
    assert len(members) == len(naive)
    assert set(members.ids) == naive.keys()
    assert [each.request.id for each in members.entries] == list(members.ids)
    assert members.growth() == sum(one.kv % block_size == 0 for one in naive.values())
    rows = [naive[name] for name in members.ids]
    seq, prompt, generated, cap = members.columns()
    assert seq.tolist() == [one.entry.seq for one in rows]
    assert prompt.tolist() == [one.entry.request.prompt_tokens for one in rows]
    assert generated.tolist() == [one.generated for one in rows]
    assert cap.tolist() == [one.entry.request.cap for one in rows]
    for name, one in naive.items():
        assert name in members
        assert members.generated(one.entry) == one.generated


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_growth_sums_to_the_blocks_that_are_needed(block_size: int) -> None:
    members = DecodeSet(block_size)
    one = member(members, 0, prompt=7, generated=1, cap=1000)
    members.join([one.entry])
    blocks = one.entry.holding.private
    for ticks in range(1, 100):
        blocks += members.growth()
        members.tick()
        assert blocks == blocks_for(7 + ticks, block_size)


def test_ids_are_the_same_object_until_someone_joins_or_leaves() -> None:
    members = DecodeSet(4)
    first, second = (member(members, seq, 5, 1, 50) for seq in range(2))
    members.join([first.entry])
    ids = members.ids
    for _ in range(10):
        members.tick()
        members.join([])
        assert members.ids is ids
    second.entry.base = 1 - members.ticks
    members.join([second.entry])
    assert members.ids == ("0", "1")
    members.leave(first.entry)
    assert list(members.ids) == ["1"]


def test_nothing_is_kept_of_those_who_left() -> None:
    """By a cap or before it: a server takes in requests for weeks."""
    members = DecodeSet(4)
    for seq in range(300):
        one = member(members, seq, 5, 1, cap=1000 if seq % 2 else 4)
        members.join([one.entry])
        for _ in range(5):
            if one.entry in members.tick():
                break
        members.leave(one.entry)
    assert not members._capped
    assert len(members._cap_ticks) <= 150, "those whose ticks are still to come"
    while members.ticks < 2500:
        members.tick()
    assert not members._cap_ticks


def test_more_members_than_the_first_columns_hold() -> None:
    members = DecodeSet(1)
    for seq in range(200):
        members.join([member(members, seq, seq + 1, 1, 10).entry])
    assert members.columns()[1].tolist() == list(range(1, 201))


def test_columns_cannot_change_the_members() -> None:
    members = DecodeSet(1)
    members.join([member(members, 0, 5, 1, 10).entry])
    for column in members.columns():
        with pytest.raises(ValueError, match="read-only"):
            column[:] = 99
    columns = members.columns()
    members.tick()
    assert columns[2].tolist() == [1]
    assert [column.tolist() for column in members.columns()] == [[0], [5], [2], [10]]
