from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.types import Drop, Start, StepPlan
from penstock.engine.errors import KVOverflowError, PlanError
from penstock.vllm.blocks import BlockTables


def plan(
    drops: tuple[Drop, ...] = (), forget: tuple[bytes, ...] = (), starts: tuple[Start, ...] = ()
) -> StepPlan:
    return StepPlan(1, drops, forget, starts, (), ())


def test_block_0_is_vllms() -> None:
    tables = BlockTables(3, 4)
    tables.apply(plan(starts=(Start("a", 9),)))
    assert sorted(tables.grow("a", 9)) == [1, 2, 3]
    assert tables.grow("a", 12) == []
    with pytest.raises(KVOverflowError, match="1 KV blocks are needed but 0 of 3 are free"):
        tables.grow("a", 13)


def test_a_published_block_is_where_another_begins_and_outlives_the_first() -> None:
    tables = BlockTables(4, 4)
    tables.apply(plan(starts=(Start("a", 6),)))
    first, _ = tables.grow("a", 6)
    tables.publish("a", [(0, b"key")])
    tables.apply(plan(starts=(Start("b", 6, (b"key",)),)))
    tables.grow("b", 6)
    assert tables.numbers("b")[0] == first
    assert tables.numbers("a")[1] != tables.numbers("b")[1]
    tables.apply(plan(drops=(Drop("a", final=True), Drop("b", final=True))))
    tables.check()
    tables.apply(plan(starts=(Start("c", 6, (b"key",)),)))
    assert tables.numbers("c") == [first]
    tables.apply(plan(drops=(Drop("c", final=True),), forget=(b"key",)))
    tables.check()
    with pytest.raises(PlanError, match="no KV block is cached"):
        tables.apply(plan(starts=(Start("d", 6, (b"key",)),)))


def test_what_a_drop_leaves_behind_is_shared() -> None:
    tables = BlockTables(4, 4)
    tables.apply(plan(starts=(Start("a", 8),)))
    blocks = tables.grow("a", 8)
    tables.apply(plan(drops=(Drop("a", final=True, publish=((1, b"second"),)),)))
    tables.apply(plan(starts=(Start("b", 8, (b"second",)),)))
    assert tables.numbers("b") == [blocks[1]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), max_size=60))
def test_no_block_is_lost_or_handed_out_twice(moves: list[tuple[int, int]]) -> None:
    tables = BlockTables(24, 4)
    held: dict[str, int] = {}
    for number, tokens in moves:
        name = f"r{number}"
        if name not in held:
            tables.apply(plan(starts=(Start(name, tokens),)))
            held[name] = 0
        elif tokens == 12:
            tables.apply(plan(drops=(Drop(name, final=tokens > 6),)))
            del held[name]
            continue
        held[name] = min(16, held[name] + tokens)
        tables.grow(name, held[name])
        numbers = [block for one in held for block in tables.numbers(one)]
        assert len(set(numbers)) == len(numbers)
        assert all(1 <= block <= 24 for block in numbers)
        tables.check()
