"""What is known of an answer between two slices: settled tokens, loose ones, and the prompt's."""

from __future__ import annotations

import pytest

from penstock.router.answer import Answer
from penstock.router.backend import Piece
from penstock.router.body import parse
from tests.router.fakes import Fake, Fault, routed, said


def begun(cap: int, tokens: int) -> Answer:
    answer = Answer(parse({"model": "m", "prompt": [1, 2], "max_tokens": cap}))
    answer.begin(tokens)
    return answer


def test_tokens_without_text_are_kept_but_for_a_characters_worth() -> None:
    answer = begun(100, 40)
    for token in range(40):
        answer.take(Piece("", [token]))
    assert answer.generated == 0  # the text of any of them may still come
    assert answer.end_slice("length") is False
    assert (answer.generated, answer.dropped) == (32, 8)
    assert answer.continuation() == [1, 2, *range(32)]


def test_tokens_without_text_may_come_together() -> None:
    answer = begun(100, 20)
    answer.take(Piece("a", [0]))
    answer.take(Piece("", list(range(1, 20))))
    assert answer.end_slice(None) is False
    assert (answer.generated, answer.dropped) == (12, 8)
    assert answer.continuation() == [1, 2, *range(12)]


def test_a_few_tokens_without_text_may_be_a_character() -> None:
    answer = begun(100, 9)
    answer.take(Piece("a", [0]))
    for token in range(1, 9):
        answer.take(Piece("", [token]))
    answer.end_slice("length")
    assert (answer.generated, answer.dropped) == (1, 8)


async def test_an_answer_without_text_is_made_once() -> None:
    fake = Fake(mute=True)
    async with routed(fake, slice_tokens=20) as router:
        answer = await router.post(200)
        assert answer.json()["usage"]["completion_tokens"] == 200
        assert max(body["max_tokens"] for body in fake.bodies) <= 28


@pytest.mark.parametrize("ids", [True, False])
async def test_output_of_a_cut_slice_is_not_the_prompt(ids: bool) -> None:
    fake = Fake(ids=ids, context=20)
    async with routed(fake) as router:
        fake.faults += [Fault(after=3)]
        answer = await router.post(19)
        assert answer.json()["choices"][0]["text"] == said(2, 20)
        assert answer.json()["usage"]["prompt_tokens"] == 1
        assert answer.json()["usage"]["completion_tokens"] == 19
