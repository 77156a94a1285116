"""The waiting queue against a sorted list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.entry import Entry
from penstock.core.queue import WaitingQueue
from penstock.core.types import Request


def entry(seq: int, key: float = 0.0, *, prompt: int = 1, demoted: bool = False) -> Entry:
    return Entry(Request(str(seq), prompt, 5, key), seq, (key,), key, demoted=demoted)


def place(one: Entry) -> tuple[bool, tuple[float, ...], int]:
    return one.demoted, one.key, one.seq


@given(st.data())
@settings(max_examples=60)
def test_it_is_a_sorted_list(data: st.DataObject) -> None:
    queue = WaitingQueue(table=True)
    assert queue.table is not None
    naive: list[Entry] = []
    out: list[Entry] = []
    made = 0
    for _ in range(data.draw(st.integers(1, 40))):
        move = data.draw(st.sampled_from(["new", "new", "pop", "remove", "back", "demote"]))
        if move == "new":
            one = entry(made, data.draw(st.integers(0, 3)), prompt=made + 1)
            made += 1
            queue.push(one)
            naive.append(one)
        elif move == "back" and out:
            one = out.pop(data.draw(st.integers(0, len(out) - 1)))
            one.generated += 1
            queue.push(one)
            naive.append(one)
        elif move in {"pop", "remove", "demote"} and naive:
            first = move == "pop"
            one = min(naive, key=place) if first else data.draw(st.sampled_from(naive))
            queue.remove(one)
            if move == "demote":
                one.demoted = True
                queue.push(one)
                naive.append(naive.pop(naive.index(one)))
            else:
                naive.remove(one)
                out.append(one)
        assert queue.peek() is min(naive, key=place, default=None)
        assert len(queue) == len(naive)
        assert queue.tokens == sum(one.total for one in naive)
        assert queue.table.rows().entries == naive, "not as they came"


def test_ties_go_by_order_of_arrival_and_demoted_ones_come_last() -> None:
    queue = WaitingQueue()
    for one in (entry(2, 1.0), entry(0, 0.0, demoted=True), entry(1, 1.0)):
        queue.push(one)
    order = []
    while (head := queue.peek()) is not None:
        order.append(head.seq)
        queue.remove(head)
    assert order == [1, 2, 0]
    assert queue.tokens == 0


def test_what_left_out_of_turn_does_not_pile_up() -> None:
    """Behind a head that never moves, thousands may come and go, and nobody else is lost."""
    queue = WaitingQueue()
    staying = [entry(seq, 2.0 - seq) for seq in range(3)]
    for one in staying:
        queue.push(one)
    for seq in range(3, 5_000):
        one = entry(seq, 1.0)
        queue.push(one)
        queue.remove(one)
    assert len(queue._heap) < 1000
    for one in reversed(staying):
        assert queue.peek() is one
        queue.remove(one)
    assert queue.peek() is None
