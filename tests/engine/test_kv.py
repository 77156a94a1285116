"""Block placement against a model that keeps plain lists and sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.types import Capabilities
from penstock.engine.errors import KVOverflowError, PlanError
from penstock.engine.kv import BlockPool
from penstock.engine.rows import Rows, Segments, ragged

SIZE = 4


class Placement(RuleBasedStateMachine):
    """Starts, grows, shares, drops and forgets at random; ``content`` is what KV would hold."""

    @initialize(blocks=st.integers(15, 20))
    def begin(self, blocks: int) -> None:
        self.rows = Rows(Capabilities(blocks, SIZE, 3, 64, 60, prefix_cache=True))
        self.blocks = blocks
        self.texts: dict[str, list[int]] = {}
        self.content: dict[int, list[int]] = {}
        self.cached: dict[bytes, list[int]] = {}
        self.next = 0

    def table(self, name: str) -> list[int]:
        row = self.rows.row(name)
        computed = int(self.rows.computed[row])
        return self.rows.table[row, : -(-computed // SIZE)].tolist()

    def compute(self, name: str, count: int) -> None:
        row = self.rows.row(name)
        start = int(self.rows.computed[row])
        one = np.array([row], dtype=np.int64)
        segments = Segments(one, np.array([start]), np.array([count]))
        needed = -(-(start + count) // SIZE) - -(-start // SIZE)
        if needed > self.rows.pool.free:
            with pytest.raises(KVOverflowError):
                self.rows.grow(segments)
            return
        self.rows.grow(segments)
        self.rows.computed[row] += count
        table = self.table(name)
        for position in range(start, start + count):
            block = self.content.setdefault(table[position // SIZE], [-1] * SIZE)
            block[position % SIZE] = self.texts[name][position]

    @precondition(lambda self: len(self.texts) < 3)
    @rule(length=st.integers(1, 30), data=st.data())
    def start(self, length: int, data: st.DataObject) -> None:
        name = f"r{self.next}"
        self.next += 1
        keys: list[bytes] = []
        text = list(range(self.next * 100, self.next * 100 + length))
        first = sorted(key for key, block in self.cached.items() if key == repr(block).encode())
        if first and length > SIZE:
            keys = [data.draw(st.sampled_from(first))]
            text[:SIZE] = self.cached[keys[0]]
        self.texts[name] = text
        self.rows.start(name, text, keys)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        row = self.rows.row(name)
        left = int(self.rows.total[row] - self.rows.computed[row])
        if left:
            self.compute(name, data.draw(st.integers(1, left)))
        elif len(self.texts[name]) < 60:
            self.texts[name].append(self.next)
            self.rows.append(np.array([row]), np.array([self.next]))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        row = self.rows.row(name)
        full = int(self.rows.computed[row]) // SIZE
        if full:
            index = data.draw(st.integers(0, full - 1))
            key = repr(self.texts[name][: (index + 1) * SIZE]).encode()
            if key in self.cached:
                with pytest.raises(PlanError):
                    self.rows.publish(row, index, key)
            else:
                self.rows.publish(row, index, key)
                self.cached[key] = self.texts[name][index * SIZE : (index + 1) * SIZE]

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.cached)))
        self.rows.pool.forget(key)
        del self.cached[key]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        assert self.rows.drop(name).tolist() == self.texts.pop(name)
        self.rows.check_idle()

    @invariant()
    def nothing_is_lost_or_overwritten(self) -> None:
        if not hasattr(self, "rows"):
            return
        self.rows.check()
        for name, text in self.texts.items():
            row = self.rows.row(name)
            computed = int(self.rows.computed[row])
            held = [token for block in self.table(name) for token in self.content[block]]
            assert held[:computed] == text[:computed]
            assert self.rows.known(row).tolist() == text


TestPlacement = Placement.TestCase
TestPlacement.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_taking_too_much_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.take(2)
    with pytest.raises(KVOverflowError, match="2 KV blocks are needed but 1 of 3 are free"):
        pool.take(2)
    assert pool.free == 1


def test_sharing_a_missing_block_changes_nothing() -> None:
    pool = BlockPool(3)
    (block,) = pool.take(1)
    pool.publish(block, b"there")
    with pytest.raises(PlanError):
        pool.share([b"there", b"not there"])
    pool.check([np.array([block])])


def test_checks_find_lost_blocks() -> None:
    pool = BlockPool(4)
    held = pool.take(2)
    pool.check([held])
    with pytest.raises(AssertionError):
        pool.check([])
    with pytest.raises(AssertionError):
        pool.check([held[[0, 0]]])
    with pytest.raises(AssertionError, match="2 KV blocks are in use"):
        pool.check_idle()
    pool.release(held)
    pool.check_idle()


def test_ragged() -> None:
    spans = ragged(np.array([5, 0, 9, 2]), np.array([2, 3, 0, 1]))
    assert spans.tolist() == [5, 6, 0, 1, 2, 2]
