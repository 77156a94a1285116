"""Streamed text adds up to the decoded whole, at a constant cost per token."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from penstock.models import demo_path
from penstock.text import Detokenizer, TextTokenizer, load_tokenizer

UNICODE = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="the wat, .é水👍🏽", max_size=40),
)
# The tokenizers are made once per session and never change.
SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream(tokenizer: TextTokenizer, ids: Sequence[int], **options: object) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@given(text=UNICODE)
@example("👩‍👩‍👧 水")
@example("  two spaces   three")
@SHARED
def test_pieces_of_any_text_add_up(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=UNICODE)
@settings(deadline=None)
def test_pieces_add_up_with_the_embedded_model(text: str) -> None:
    tokenizer = demo()
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def demo() -> TextTokenizer:
    if not hasattr(demo, "tokenizer"):
        demo.tokenizer = load_tokenizer(demo_path())
    return demo.tokenizer


@given(data=st.data(), skip=st.booleans())
@SHARED
def test_pieces_of_any_tokens_add_up(
    tokenizers: dict[str, TextTokenizer], data: st.DataObject, *, skip: bool
) -> None:
    """Whatever a model says, malformed UTF-8 and special tokens included."""
    tokenizer = tokenizers[data.draw(st.sampled_from(["byte-level", "metaspace"]))]
    # Logits are often padded beyond the vocabulary: such ids have no text.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 20), max_size=60))
    pieces = stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
@SHARED
def test_long_malformed_runs_add_up(
    tokenizers: dict[str, TextTokenizer], data: st.DataObject
) -> None:
    tokenizer = tokenizers["byte-level"]
    everything = range(tokenizer.vocab_size)
    broken = [id_ for id_ in everything if "\ufffd" in tokenizer.decode([id_])]
    few = data.draw(st.lists(st.sampled_from(broken), min_size=1, max_size=3))
    runs = st.lists(st.sampled_from(few), min_size=20, max_size=60)
    ids = data.draw(runs) + tokenizer.encode("水") + data.draw(runs)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte-fallback", "metaspace"])
def test_ids_without_text_do_not_cost_the_next_word_its_space(
    tokenizers: dict[str, TextTokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    nothing = tokenizer.vocab_size + 3
    ids = [*tokenizer.encode("the water"), nothing, *tokenizer.encode("the gate")]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "the water the gate"


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_a_character_comes_out_whole(tokenizers: dict[str, TextTokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("a🦦b🪼")
    assert len(ids) > 6  # the corpus does not know them: one token per byte
    pieces = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "🦦", "b", "🪼"]
    assert pieces[-1] == ""


def test_text_comes_with_the_token_that_completes_it(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("the water is high")
    assert stream(tokenizer, ids)[:-1] == [tokenizer.decode([token]) for token in ids]


def test_an_incomplete_end_is_flushed(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("a🦦")[:-1]
    pieces = stream(tokenizer, ids)
    assert pieces[:-1] == ["a", *[""] * (len(ids) - 1)]
    assert pieces[-1] == "\ufffd"


def test_special_tokens_are_said_on_demand(tokenizer: TextTokenizer) -> None:
    special = tokenizer.encode("<user>the<end>")
    assert len(tokenizer.special_ids & set(special)) == 2
    assert "".join(stream(tokenizer, special)) == "the"
    said = "".join(stream(tokenizer, special, skip_special_tokens=False))
    assert said == tokenizer.decode(special, skip_special_tokens=False)
    assert said.startswith("<user>")


def test_a_prompt_gives_the_first_word_its_space(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte-fallback"]
    prompt, output = tokenizer.encode("the gate"), tokenizer.encode("the water")
    assert "".join(stream(tokenizer, output)) == "the water"
    assert "".join(stream(tokenizer, output, prompt=prompt)) == " the water"


@given(text=UNICODE, cut=st.floats(0, 1))
@SHARED
def test_a_continuation_is_the_rest_of_the_whole(
    tokenizer: TextTokenizer, text: str, cut: float
) -> None:
    ids = tokenizer.encode(text)
    at = int(cut * len(ids))
    before = tokenizer.decode(ids[:at])
    whole = tokenizer.decode(ids)
    if before.endswith("\ufffd") or not whole.startswith(before) or not before:
        return  # the prompt ends inside a character, or has no text to continue
    assert before + "".join(stream(tokenizer, ids[at:], prompt=ids[:at])) == whole


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", ["the gate 🦦 the", "the 🦦🪼🦦🪼🦦🪼", "the \ufffd🦦."])
def test_a_character_that_the_prompt_breaks_off_in_is_said_when_it_is_complete(
    tokenizers: dict[str, TextTokenizer], name: str, text: str
) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    for at in range(1, len(ids)):
        said = "".join(stream(tokenizer, ids[at:], prompt=ids[:at]))
        ends = [tokenizer.decode(ids[:end]) for end in range(1, at + 1)]
        whole = max((end for end in ends if not end.endswith("\ufffd")), key=len)
        # A prompt may end in U+FFFD itself, which nothing tells from a character that is broken
        # off there too; saying it twice is better than losing what follows.
        assert (whole + said).replace("\ufffd", "") == text.replace("\ufffd", "")


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("output", ["", "the"])
def test_a_character_that_stays_broken_off_is_the_prompts(
    tokenizers: dict[str, TextTokenizer], name: str, output: str
) -> None:
    tokenizer = tokenizers[name]
    prompt = tokenizer.encode("the gate🦦")[:-1]
    ids = tokenizer.encode(output)
    said = "".join(stream(tokenizer, ids, prompt=prompt))
    assert tokenizer.decode(prompt) + said == tokenizer.decode(prompt + ids)


class Counting(TextTokenizer):
    """Counts how many ids were decoded."""

    decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: FBT002
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", ["the water is high, ", "🦦🪼", "malformed"])
def test_cost_per_token_is_constant(
    tokenizers: dict[str, TextTokenizer], name: str, text: str
) -> None:
    tokenizer = Counting(tokenizers[name]._tokenizer)
    ids = tokenizer.encode(text)
    if text == "malformed":
        ids = [tokenizer.encode("🦦")[-1]]  # a continuation byte, for ever
    costs = []
    for length in (500, 1000):
        tokenizer.decoded = 0
        pieces = stream(tokenizer, (ids * length)[:length])
        assert len(pieces[-1]) < 20
        costs.append(tokenizer.decoded / length)
    assert costs[1] < 1.1 * costs[0] < 60


def test_cost_is_bounded_where_nothing_can_be_cut() -> None:
    """Each token is a word that ends as an incomplete character does."""
    model = models.WordLevel({"▁\ufffd": 0, "▁the": 1}, "▁the")
    plain = Tokenizer(model)
    plain.decoder = decoders.Metaspace()
    tokenizer = Counting(plain)
    ids = [1, *[0] * 500, 1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert max(map(len, pieces)) < 200
    assert tokenizer.decoded < 700 * len(ids)
