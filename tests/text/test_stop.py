"""Stop strings against a search that sees the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text import StopStrings, TextStream, TextTokenizer

LETTERS = st.text(alphabet="ab水", max_size=30)
STOPS = st.lists(st.text(alphabet="ab水", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Say the text letter by letter, and stop when it ends in a stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8))
@settings(max_examples=400)
def test_the_result_is_that_of_a_naive_search(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopStrings(stops)
    said = ""
    for piece in pieces_of(text, cuts):
        said += scanner.push(piece)
        assert naive(text, stops)[0].startswith(said)
    assert (said + scanner.finish(), scanner.matched) == naive(text, stops)


@given(text=LETTERS, stops=STOPS)
@settings(max_examples=200)
def test_no_more_is_held_back_than_needed(text: str, stops: list[str]) -> None:
    """What is held could still become a stop string, and the letter before it could not."""
    scanner = StopStrings(stops)
    said = ""
    for letter in text:
        said += scanner.push(letter)
    if scanner.matched is None:
        held = text[len(said) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_follows_a_match() -> None:
    scanner = StopStrings(["\n\n"])
    assert scanner.push("one\n") == "one"
    assert scanner.push("\ntwo") == ""
    assert scanner.matched == "\n\n"
    assert scanner.push("three") == ""
    assert scanner.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop holds an empty string"):
        StopStrings(["a", ""])


@given(
    text=st.text(alphabet="the wat🦦水", max_size=40),
    start=st.integers(0, 39),
    size=st.integers(1, 6),
)
@settings(deadline=None)
def test_streams_stop_in_the_middle_of_tokens(
    tokenizers: dict[str, TextTokenizer], text: str, start: int, size: int
) -> None:
    tokenizer = tokenizers["byte-level"]
    stops = [text[start : start + size]] if start < len(text) else ["never"]
    stream = TextStream(tokenizer, stop=stops)
    said = ""
    for token in tokenizer.encode(text):
        said += stream.push(token)
        if stream.stopped:
            break
    said += stream.finish()
    assert said == text.partition(stops[0])[0]
    assert stream.stopped == (stops[0] in text)
    assert stream.matched == (stops[0] if stream.stopped else None)


def test_a_stop_string_in_the_flushed_end_counts(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    stream = TextStream(tokenizer, stop=["\ufffd"])
    for token in tokenizer.encode("a🦦")[:-1]:
        stream.push(token)
    assert not stream.stopped
    assert stream.finish() == ""
    assert stream.stopped
    assert stream.push(5) == stream.finish() == ""


def test_without_stop_strings_nothing_is_held_back(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, tokenizer.encode("the water"))) == "the water"
    assert stream.finish() == ""
