"""KV accounting against a naive model, and the content addresses of prefixes."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.memory import Holding, Ledger, blocks_for, prefix_keys
from penstock.core.types import PrefixKey

CHAINS = [[bytes([chain, depth]) for depth in range(3)] for chain in range(2)]


class NaiveLedger(RuleBasedStateMachine):
    """Every count worked out anew from who holds what, after every operation."""

    @initialize(capacity=st.integers(4, 14))
    def start(self, capacity: int) -> None:
        self.ledger = Ledger(capacity, 4)
        self.capacity = capacity
        self.private: dict[Holding, int] = {}
        self.keys: dict[Holding, list[PrefixKey]] = {}
        self.idle: list[PrefixKey] = []  # least recently used first
        self.forgotten: list[PrefixKey] = []

    def held(self) -> set[PrefixKey]:
        return {key for keys in self.keys.values() for key in keys}

    def free(self) -> int:
        return self.capacity - sum(self.private.values()) - len(self.held())

    def reclaim(self) -> None:
        while self.capacity - self.free() + len(self.idle) > self.capacity:
            self.forgotten.append(self.idle.pop(0))

    @rule(chain=st.sampled_from(CHAINS), private=st.integers(0, 4), limit=st.integers(0, 3))
    def take(self, chain: list[PrefixKey], private: int, limit: int) -> None:
        held = self.held()
        known = [key in held or key in self.idle for key in chain[:limit]]
        cached = known.index(False) if False in known else len(known)
        keys = chain[:cached]
        in_use = sum(key in held for key in keys)
        assert self.ledger.hits(chain, limit) == (cached, in_use)
        if private + cached - in_use > self.free():
            return
        holding = Holding()
        self.ledger.take(holding, private, keys)
        self.private[holding] = private
        self.keys[holding] = list(keys)
        self.idle = [key for key in self.idle if key not in keys]
        self.reclaim()

    @precondition(lambda self: self.free() > 0)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        if not self.private:
            return
        holding = data.draw(st.sampled_from(list(self.private)))
        blocks = data.draw(st.integers(1, self.free()))
        self.ledger.grow(blocks)
        holding.private += blocks
        self.private[holding] += blocks
        self.reclaim()

    @rule(data=st.data(), chain=st.sampled_from(CHAINS), depth=st.integers(0, 2))
    def publish(self, data: st.DataObject, chain: list[PrefixKey], depth: int) -> None:
        able = [holding for holding, private in self.private.items() if private]
        if not able:
            return
        holding, key = data.draw(st.sampled_from(able)), chain[depth]
        fresh = key not in self.held() and key not in self.idle
        assert self.ledger.publish(holding, key) == fresh
        if fresh:
            self.private[holding] -= 1
            self.keys[holding].append(key)

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if not self.private:
            return
        holding = data.draw(st.sampled_from(list(self.private)))
        self.ledger.give_back(holding)
        del self.private[holding]
        mine = self.keys.pop(holding)
        held = self.held()
        self.idle.extend(key for key in reversed(mine) if key not in held)
        assert (holding.private, holding.keys, holding.sole) == (0, [], 0)

    @rule()
    def collect(self) -> None:
        assert self.ledger.take_forgotten() == tuple(self.forgotten)
        self.forgotten.clear()

    @invariant()
    def counts_agree(self) -> None:
        self.ledger.check()
        holders = {
            key: [holding for holding, keys in self.keys.items() if key in keys]
            for key in self.held()
        }
        assert self.ledger.free == self.free()
        assert self.ledger.used == self.capacity - self.free()
        assert self.ledger.idle == len(self.idle)
        assert self.ledger.common == sum(len(each) > 1 for each in holders.values())
        for holding, keys in self.keys.items():
            assert holding.private == self.private[holding]
            assert holding.keys == keys
            assert holding.sole == sum(len(holders[key]) == 1 for key in keys)
            assert holding.common == len(keys) - holding.sole


NaiveLedger.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = NaiveLedger.TestCase


def test_who_shares_with_whom_is_counted_while_holders_come_and_go() -> None:
    ledger = Ledger(10, 1)
    first, second, third = Holding(), Holding(), Holding()
    chain = CHAINS[0]
    ledger.take(first, 3)
    for key in chain:
        assert ledger.publish(first, key)

    def counts() -> list[int]:
        return [ledger.common, first.sole, second.sole, third.sole]

    assert counts() == [0, 3, 0, 0]
    ledger.take(second, 1, chain[:2])
    assert counts() == [2, 1, 0, 0]
    ledger.take(third, 1, chain[:1])
    assert counts() == [2, 1, 0, 0]
    assert (ledger.used, first.common, second.common, third.common) == (5, 2, 2, 1)
    ledger.give_back(first)
    assert counts() == [1, 0, 1, 0]
    assert ledger.idle == 1
    ledger.give_back(third)
    assert counts() == [0, 0, 2, 0]
    ledger.give_back(second)
    assert (ledger.used, ledger.idle, ledger.common) == (0, 3, 0)


def test_too_much_is_refused_loudly() -> None:
    ledger = Ledger(4, 1)
    with pytest.raises(MemoryError, match="KV memory exceeded by 1 of 4 blocks"):
        ledger.take(Holding(), 5)


def test_idle_blocks_are_given_up_least_recently_used_and_leaves_first() -> None:
    ledger = Ledger(6, 1)
    for chain in CHAINS[:2]:
        holding = Holding()
        ledger.take(holding, 3)
        for key in chain[:3]:
            assert ledger.publish(holding, key)
        ledger.give_back(holding)
    assert (ledger.used, ledger.idle, ledger.free) == (0, 6, 6)
    touch = Holding()
    ledger.take(touch, 0, CHAINS[0][:1])
    ledger.give_back(touch)
    ledger.take(Holding(), 5)
    first, second = CHAINS[:2]
    assert ledger.take_forgotten() == (first[2], first[1], second[2], second[1], second[0])
    assert ledger.take_forgotten() == ()
    assert ledger.hits(first, 3) == (1, 0)


@pytest.mark.parametrize(
    ("tokens", "size", "blocks"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (7, 1, 7)]
)
def test_blocks_for(tokens: int, size: int, blocks: int) -> None:
    assert blocks_for(tokens, size) == blocks


tokens = st.lists(st.integers(0, 2**40), max_size=30)


@given(tokens, st.integers(1, 8), st.integers(0, 30))
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(text: list[int], size: int, length: int) -> None:
    keys = prefix_keys(text, size)
    assert len(keys) == len(text) // size
    shorter = prefix_keys(text[:length], size)
    assert keys[: len(shorter)] == shorter
    assert len(set(keys)) == len(keys)


@given(tokens.filter(bool), st.integers(1, 8), st.data())
def test_a_change_changes_every_key_from_there_on(
    text: list[int], size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    other = list(text)
    other[at] += 1
    pairs = zip(prefix_keys(text, size), prefix_keys(other, size), strict=True)
    assert [one == two for one, two in pairs] == [
        (index + 1) * size <= at for index in range(len(text) // size)
    ]


@given(tokens, st.integers(1, 8), st.integers(0, 5))
def test_a_chain_can_be_continued(text: list[int], size: int, done: int) -> None:
    keys = prefix_keys(text, size)
    parent = keys[min(done, len(keys)) - 1] if done and keys else b""
    start = min(done, len(keys)) * size
    assert prefix_keys(text[start:], size, parent) == keys[start // size :]


def test_keys_depend_on_the_tokens_only() -> None:
    text = [1, 2, 3, 4, 5]
    assert prefix_keys(text, 2) == prefix_keys(tuple(text), 2) == prefix_keys(array("q", text), 2)
    assert prefix_keys(range(1, 6), 2) == prefix_keys(text, 2)
    assert {len(key) for key in prefix_keys(text, 1)} == {16}
