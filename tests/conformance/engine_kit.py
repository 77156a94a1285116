"""What every engine must do: :func:`check_engine`, over plans written by hand.

Prompts use token ids below 64.  Every request has a trace length, so that engines with
and without a model stop alike; sampling is greedy, so that a request's tokens must not depend on
how its prompt was cut, what ran beside it, what it shared, or how often it was evicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from penstock.core.engine import KV, Engine, Work
from penstock.core.memory import prefix_keys
from penstock.core.sampling import SamplingParams
from penstock.core.types import (
    Capabilities,
    Chunk,
    Drop,
    PrefixKey,
    RequestError,
    RequestId,
    Start,
    StepPlan,
    StepResult,
)

MakeEngine = Callable[[Capabilities], Engine]

BLOCK = 4
CAPABILITIES = Capabilities(
    kv_blocks=16,
    block_size=BLOCK,
    max_batch=4,
    max_step_tokens=24,
    max_request_tokens=40,
    prefix_cache=True,
)
PROMPT = (7, 3, 41, 12, 12, 60, 5, 33, 18, 2, 9)
OTHER = (50, 8, 8, 31, 44)


@dataclass
class Desk:
    """Numbers plans, runs them, checks the shape of what comes back, and keeps the tokens."""

    engine: Engine
    number: int = 0
    texts: dict[RequestId, list[int]] = field(default_factory=dict)
    works: dict[RequestId, Work] = field(default_factory=dict)

    def open(
        self,
        name: RequestId,
        prompt: Sequence[int],
        length: int,
        generated: Sequence[int] = (),
        *,
        kv: KV | None = None,
    ) -> None:
        self.works[name] = Work(prompt, SamplingParams(temperature=0.0), length, generated, kv)
        self.texts[name] = list(generated)
        self.engine.open(name, self.works[name])

    def step(
        self,
        *,
        drops: Sequence[Drop] = (),
        forget: Sequence[PrefixKey] = (),
        starts: Sequence[Start] = (),
        chunks: Sequence[Chunk] = (),
        decode: tuple[RequestId, ...] = (),
        capped: tuple[RequestId, ...] = (),
    ) -> StepResult:
        self.number += 1
        plan = StepPlan(
            self.number, tuple(drops), tuple(forget), tuple(starts), tuple(chunks), decode,
            capped=capped,
        )  # fmt: skip
        ticket = self.engine.submit(plan)
        assert ticket.number == plan.number
        result = self.engine.collect(ticket)
        assert result.number == plan.number
        assert math.isfinite(result.seconds)
        assert result.seconds >= 0
        assert result.failed == {}
        due = {chunk.id for chunk in chunks if chunk.samples} | set(decode)
        assert set(result.tokens) == due, "tokens are due for sampling chunks and decodes only"
        assert set(result.stopped) <= due, "a request stops with a token"
        assert set(result.capped) == set(capped) - set(result.stopped)
        for name, token in result.tokens.items():
            self.texts[name].append(token.id)
        return result

    def known(self, name: RequestId) -> list[int]:
        """All tokens a request has."""
        return [*self.works[name].prompt, *self.texts[name]]

    def enter(
        self, name: RequestId, cached: Sequence[PrefixKey] = (), *, publish: bool = False
    ) -> StepResult:
        """Start a request and compute all its tokens in one chunk."""
        start, end = len(cached) * BLOCK, len(self.known(name))
        named: tuple[tuple[int, PrefixKey], ...] = ()
        if publish:
            keys = prefix_keys(self.works[name].prompt, BLOCK)
            named = tuple(enumerate(keys))[len(cached) :]
        return self.step(
            starts=[Start(name, end, tuple(cached))],
            chunks=[Chunk(name, start, end - start, samples=True, publish=named)],
        )

    def finish(self, name: RequestId) -> StepResult:
        """Decode until the request stops; returns the last step's result."""
        alone = (name,)
        for _ in range(1000):
            result = self.step(decode=alone)
            if name in result.stopped:
                return result
        pytest.fail(f"{name} does not stop")

    def leave(self, *names: RequestId) -> None:
        """Drop requests for good."""
        self.step(drops=[Drop(name, final=True) for name in names])


def check_engine(make_engine: MakeEngine, *, depth: int = 1) -> None:
    """Raise AssertionError, or whatever the engine raises, unless it keeps the contract.

    Args:
        make_engine: makes an engine with these capabilities.
        depth: plans that it can have in flight.
    """
    capabilities = replace(CAPABILITIES, depth=depth)
    for check in CHECKS if depth == 1 else (*CHECKS, names_a_stopped_request_once_more):
        engine = make_engine(capabilities)
        assert engine.capabilities == capabilities
        try:
            check(engine)
        finally:
            engine.close()
            engine.close()


def has_the_interface(engine: Engine) -> None:
    assert isinstance(engine, Engine)


def refuses_tokens_outside_the_vocabulary(engine: Engine) -> None:
    for wrong in (-1, 1 << 30):
        with pytest.raises(RequestError) as caught:
            engine.open("a", Work((1, wrong)))
        assert caught.value.field == "prompt"
    Desk(engine).open("a", (1, 2), 3)  # the id is free


def discards_what_never_started(engine: Engine) -> None:
    desk = Desk(engine)
    for _ in range(3):
        desk.open("a", PROMPT, 3)
        engine.discard("a")
    desk.open("a", PROMPT, 3)
    desk.enter("a")


def runs_plans_without_work(engine: Engine) -> None:
    desk = Desk(engine)
    for _ in range(2):
        desk.step()
    desk.open("a", PROMPT, 4)
    desk.step(starts=[Start("a", len(PROMPT))])
    desk.step()
    desk.step(drops=[Drop("a", final=True)])
    desk.open("a", PROMPT, 4)  # a final drop forgets the payload


def stops_at_the_trace_length(engine: Engine) -> None:
    desk = Desk(engine)
    for length in (1, 2, 9):
        desk.open("a", PROMPT, length)
        result = desk.enter("a")
        if length > 1:
            assert result.stopped == {}
            result = desk.finish("a")
        assert list(result.stopped) == ["a"]
        assert len(desk.texts["a"]) == length
        # The last token has no KV.
        assert result.stopped["a"] == prefix_keys(desk.known("a")[:-1], BLOCK)
        desk.leave("a")


def does_not_care_how_a_prompt_is_cut(engine: Engine) -> None:
    desk = Desk(engine)
    desk.open("whole", PROMPT, 6)
    desk.enter("whole")
    desk.finish("whole")
    desk.leave("whole")
    desk.open("cut", PROMPT, 6)
    desk.step(starts=[Start("cut", 11)], chunks=[Chunk("cut", 0, 1, samples=False)])
    desk.step(chunks=[Chunk("cut", 1, 6, samples=False)])
    desk.step()
    desk.step(chunks=[Chunk("cut", 7, 3, samples=False)])
    desk.step(chunks=[Chunk("cut", 10, 1, samples=True)])
    desk.finish("cut")
    assert desk.texts["cut"] == desk.texts["whole"]


def mixes_prefill_and_decode(engine: Engine) -> None:
    desk = Desk(engine)
    for name, prompt in (("a", PROMPT), ("b", OTHER), ("c", OTHER[::-1]), ("d", PROMPT[::-1])):
        desk.open(name, prompt, 8)
    desk.step(
        starts=[Start("a", 11), Start("b", 5)],
        chunks=[Chunk("a", 0, 11, samples=True), Chunk("b", 0, 3, samples=False)],
    )
    desk.step(chunks=[Chunk("b", 3, 2, samples=True)], decode=("a",))
    desk.step(starts=[Start("c", 5)], chunks=[Chunk("c", 0, 4, samples=False)], decode=("a", "b"))
    desk.step(decode=("a", "b"))
    desk.step(
        starts=[Start("d", 11)],
        chunks=[Chunk("c", 4, 1, samples=True), Chunk("d", 0, 11, samples=True)],
        decode=("b", "a"),
    )
    everyone = ("d", "b", "c", "a")
    for _ in range(3):
        result = desk.step(decode=everyone)
    assert set(result.stopped) == {"a"}
    desk.step(drops=[Drop("a", final=True)], decode=("b", "c", "d"))
    result = desk.step(drops=[Drop("b", final=True)], decode=tuple("cd"))
    texts = {name: desk.texts[name] for name in "abcd"}
    desk.leave("c", "d")
    for name, text in texts.items():
        alone = Desk(engine, desk.number)
        alone.open("alone", desk.works[name].prompt, 8)
        alone.enter("alone")
        alone.finish("alone")
        alone.leave("alone")
        desk.number = alone.number
        assert alone.texts["alone"][: len(text)] == text, f"{name} depends on its neighbours"


def recomputes_after_an_eviction(engine: Engine) -> None:
    desk = Desk(engine)
    desk.open("calm", PROMPT, 9)
    desk.enter("calm")
    desk.finish("calm")
    desk.leave("calm")
    desk.open("a", PROMPT, 9)
    desk.step(starts=[Start("a", 11)], chunks=[Chunk("a", 0, 7, samples=False)])
    desk.step(drops=[Drop("a", final=False)])  # evicted in prefill
    desk.enter("a")
    for _ in range(3):
        desk.step(decode=("a",))
    desk.step(drops=[Drop("a", final=False)])  # and in decode
    # 15 tokens: 11 of the prompt, 4 generated.
    desk.step(starts=[Start("a", 15)], chunks=[Chunk("a", 0, 13, samples=False)])
    desk.step(chunks=[Chunk("a", 13, 2, samples=True)])
    # Evicted and back in one plan.
    desk.step(
        drops=[Drop("a", final=False)],
        starts=[Start("a", 16)],
        chunks=[Chunk("a", 0, 16, samples=True)],
    )
    desk.finish("a")
    assert desk.texts["a"] == desk.texts["calm"]


def _undisturbed(desk: Desk) -> list[int]:
    """What a request says that nothing happens to."""
    desk.open("whole", PROMPT, 9)
    desk.enter("whole")
    desk.finish("whole")
    desk.leave("whole")
    return desk.texts["whole"]


def swaps_an_evicted_request(engine: Engine) -> None:
    """Its KV goes to host memory and back: mid-prompt, while it decodes, and twice in a row."""
    desk = Desk(engine)
    whole, size = _undisturbed(desk), len(PROMPT)
    desk.open("out", PROMPT, 9)
    desk.step(starts=[Start("out", size, ())], chunks=[Chunk("out", 0, 5, samples=False)])
    desk.step(drops=[Drop("out", final=False, swapped=5)])
    desk.step(starts=[Start("out", size, (), 5)], chunks=[Chunk("out", 5, size - 5, samples=True)])
    desk.step(decode=("out",))
    for _ in range(2):
        known = len(desk.known("out"))
        desk.step(drops=[Drop("out", final=False, swapped=known - 1)])
        desk.open("other", [7] * size, 3)  # takes the blocks meanwhile
        desk.enter("other")
        desk.finish("other")
        desk.leave("other")
        desk.step(
            starts=[Start("out", known, (), known - 1)],
            chunks=[Chunk("out", known - 1, 1, samples=True)],
        )
    desk.finish("out")
    assert desk.texts["out"] == whole
    desk.leave("out")
    desk.open("ends", PROMPT, 9)
    desk.enter("ends")
    desk.step(drops=[Drop("ends", final=False, swapped=size)])
    desk.engine.discard("ends")


def needs_no_swapped_kv_of_what_others_share_by_then(engine: Engine) -> None:
    """Evicted in mid-prompt with KV of 5 tokens; meanwhile another published 8 of the same."""
    desk = Desk(engine)
    whole, size, keys = _undisturbed(desk), len(PROMPT), prefix_keys(PROMPT, BLOCK)
    desk.open("out", PROMPT, 9)
    desk.step(starts=[Start("out", size, ())], chunks=[Chunk("out", 0, 5, samples=False)])
    desk.step(drops=[Drop("out", final=False, swapped=5)])
    desk.open("other", PROMPT, 2)
    desk.enter("other", publish=True)
    start = len(keys) * BLOCK
    assert start > 5
    desk.step(
        starts=[Start("out", size, keys, 5)],
        chunks=[Chunk("out", start, size - start, samples=True)],
    )
    desk.finish("out")
    assert desk.texts["out"] == whole


def goes_on_with_what_came_elsewhere(engine: Engine) -> None:
    desk = Desk(engine)
    whole = _undisturbed(desk)
    desk.open("rest", PROMPT, 9, whole[:4])
    desk.enter("rest")
    desk.finish("rest")
    assert desk.texts["rest"] == whole
    desk.leave("rest")
    desk.open("last", PROMPT, 9, whole[:8])
    result = desk.enter("last")
    assert desk.texts["last"] == whole
    assert set(result.stopped) == {"last"}


def _kv(desk: Desk) -> KV:
    """KV of a request with 4 tokens of output, which has left."""
    desk.open("from", PROMPT, 9)
    assert desk.engine.take_kv("from") is None, "it has not started"
    desk.enter("from")
    for _ in range(3):
        desk.step(decode=("from",))
    kv = desk.engine.take_kv("from")
    assert kv is not None
    assert kv.tokens == 14  # its latest token has none
    assert kv.bytes >= 0
    desk.leave("from")
    assert desk.engine.take_kv("from") is None, "it has left"
    return kv


def hands_its_kv_over_in_parts(engine: Engine) -> None:
    """After each chunk, cut anywhere, and the rest at the end."""
    desk = Desk(engine)
    whole, size = _undisturbed(desk), len(PROMPT)
    desk.open("from", PROMPT, 9)
    assert desk.engine.take_kv("from", 0, 3) is None, "it has not started"
    desk.step(starts=[Start("from", size, ())], chunks=[Chunk("from", 0, 5, samples=False)])
    parts = [desk.engine.take_kv("from", 0, 3), desk.engine.take_kv("from", 3, 5)]
    desk.step(chunks=[Chunk("from", 5, size - 5, samples=True)])
    parts.append(desk.engine.take_kv("from", 5, 9))
    desk.step(decode=("from",))
    parts.append(desk.engine.take_kv("from", 9))
    desk.leave("from")
    assert desk.engine.take_kv("from", 0, 3) is None, "it has left"
    there = [part for part in parts if part is not None]
    assert [part.tokens for part in there] == [3, 2, 4, size + 1 - 9]
    kv: Any = type(there[0])
    desk.open("to", PROMPT, 9, whole[:2], kv=kv.join(there))
    desk.step(
        starts=[Start("to", size + 2, (), size + 1)],
        chunks=[Chunk("to", size + 1, 1, samples=True)],
    )
    desk.finish("to")
    assert desk.texts["to"] == whole
    desk.leave("to")


def hands_its_kv_over(engine: Engine) -> None:
    desk = Desk(engine)
    desk.open("whole", PROMPT, 9)
    desk.enter("whole", publish=True)
    desk.finish("whole")
    desk.leave("whole")
    keys, whole = prefix_keys(PROMPT, BLOCK), desk.texts["whole"]
    for name, cached in (("to", ()), ("shares", keys), ("evicted", keys[:1])):
        desk.open(name, PROMPT, 9, whole[:4], kv=_kv(desk))
        desk.step(
            starts=[Start(name, 15, tuple(cached), 14)], chunks=[Chunk(name, 14, 1, samples=True)]
        )
        if name == "evicted":
            desk.step(decode=(name,))
            desk.step(drops=[Drop(name, final=False)])
            desk.enter(name)  # recomputes: what it brought is gone
        desk.finish(name)
        assert desk.texts[name] == whole, name
        desk.leave(name)


def refuses_kv_of_more_than_a_request_has(engine: Engine) -> None:
    desk = Desk(engine)
    kv = _kv(desk)
    with pytest.raises(RequestError) as caught:
        desk.open("to", PROMPT, 9, desk.texts["from"][:3], kv=kv)
    assert caught.value.field == "kv"
    desk.open("to", PROMPT, 9)  # the id is free


def shares_published_blocks(engine: Engine) -> None:
    desk = Desk(engine)
    keys = prefix_keys(PROMPT, BLOCK)
    desk.open("first", PROMPT, 6)
    desk.enter("first", publish=True)
    desk.open("second", PROMPT, 6)
    desk.enter("second", cached=keys)  # while the first still runs
    desk.finish("first")
    desk.leave("first")
    desk.finish("second")
    desk.leave("second")
    desk.open("third", PROMPT, 6)
    desk.enter("third", cached=keys[:1])  # while nobody does
    desk.finish("third")
    assert desk.texts["first"] == desk.texts["second"] == desk.texts["third"]


def shares_blocks_that_a_stopped_request_leaves(engine: Engine) -> None:
    desk = Desk(engine)
    desk.open("a", PROMPT, 6)
    desk.enter("a")
    keys = desk.finish("a").stopped["a"]
    assert len(keys) == 4  # 16 tokens with KV
    longer = (*desk.known("a"), 1, 2)
    desk.step(drops=[Drop("a", final=True, publish=tuple(enumerate(keys)))])
    _begins_behind(desk, longer, keys)


def _begins_behind(desk: Desk, longer: Sequence[int], keys: Sequence[PrefixKey]) -> None:
    """Behind shared blocks a request says what it says without them."""
    desk.open("b", longer, 5)
    desk.enter("b", cached=keys)
    desk.finish("b")
    desk.step(drops=[Drop("b", final=True)], forget=keys)
    desk.open("c", longer, 5)
    desk.enter("c")
    desk.finish("c")
    assert desk.texts["b"] == desk.texts["c"]


def shares_blocks_that_a_capped_request_leaves(engine: Engine) -> None:
    desk = Desk(engine)
    desk.open("a", PROMPT, 99)
    desk.open("stops", PROMPT, 7)
    desk.enter("a")
    desk.enter("stops")
    both = ("a", "stops")
    for _ in range(5):
        result = desk.step(decode=both)
        assert result.capped == {}
    result = desk.step(decode=both, capped=both)
    keys = result.capped["a"]
    assert keys == result.stopped["stops"] == prefix_keys(desk.known("a")[:-1], BLOCK)
    longer = (*desk.known("a"), 1, 2)
    shared = Drop("a", final=True, publish=tuple(enumerate(keys)))
    desk.step(drops=[shared, Drop("stops", final=True)])
    _begins_behind(desk, longer, keys)


def uses_all_memory_again_and_again(engine: Engine) -> None:
    desk = Desk(engine)
    keys = prefix_keys(PROMPT, BLOCK)
    # 16 blocks: 4 requests of 4 blocks each, 2 of which the first leaves in the cache.
    for _ in range(4):
        names = ("a", "b", "c", "d")
        for name in names:
            desk.open(name, PROMPT, 6)
        desk.enter("a", publish=True)
        for name in names[1:]:
            desk.enter(name)
        for _ in range(5):
            result = desk.step(decode=names)
        assert set(result.stopped) == set(names)
        assert len({tuple(desk.texts[name]) for name in names}) == 1
        desk.leave(*names)
        desk.step(forget=keys)


def names_a_stopped_request_once_more(engine: Engine) -> None:
    """Planned before its end was known; its token is void, the others' are not."""
    desk = Desk(engine)
    desk.open("short", PROMPT, 2)
    desk.open("long", OTHER, 5)
    desk.enter("short")
    desk.enter("long")
    both = ("short", "long")
    plans = [StepPlan(number, (), (), (), (), both) for number in (3, 4)]
    tickets = [engine.submit(plan) for plan in plans]
    first, second = (engine.collect(ticket) for ticket in tickets)
    assert list(first.stopped) == ["short"]
    assert "short" not in second.stopped, "it stops once"
    desk.texts["long"] += [result.tokens["long"].id for result in (first, second)]
    desk.number = 4
    desk.step(drops=[Drop("short", final=True)], decode=("long",))
    desk.finish("long")
    desk.open("again", OTHER, 5)
    desk.enter("again")
    desk.finish("again")
    assert desk.texts["again"] == desk.texts["long"]


CHECKS: tuple[Callable[[Engine], None], ...] = (
    has_the_interface,
    refuses_tokens_outside_the_vocabulary,
    discards_what_never_started,
    runs_plans_without_work,
    stops_at_the_trace_length,
    does_not_care_how_a_prompt_is_cut,
    mixes_prefill_and_decode,
    recomputes_after_an_eviction,
    swaps_an_evicted_request,
    needs_no_swapped_kv_of_what_others_share_by_then,
    goes_on_with_what_came_elsewhere,
    hands_its_kv_over,
    hands_its_kv_over_in_parts,
    refuses_kv_of_more_than_a_request_has,
    shares_published_blocks,
    shares_blocks_that_a_stopped_request_leaves,
    shares_blocks_that_a_capped_request_leaves,
    uses_all_memory_again_and_again,
)
