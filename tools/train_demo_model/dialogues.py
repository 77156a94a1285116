"""Turn the source texts into question-and-answer dialogues; every choice comes from one seed."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sources import Article, Synset
from sword import Verse

HELD_OUT_SHARE = 50  # one unit of text (entry, chapter, sense) in this many is never trained on
MAX_ANSWER_CHARS = 1900
LONG_ANSWER_CHARS = 3600
LONG_ANSWER_SHARE = 0.1
CONTINUED_CHARS = 600  # an entry longer than this also teaches to continue a text
FULL_SENTENCE_SHARE = 0.6  # 'A hack is ...' rather than 'Hack (noun): ...'
SYNONYM_SHARE = 0.6
EXAMPLE_SHARE = 0.8
LIST_SHARE = 0.5  # numbered lists rather than paragraphs, where a word has several senses
TAXONOMY = 3  # a word with more kinds than this deserves a longer entry
# What becomes of a Bible passage: cumulative shares, and the least that the form needs.
CONTINUE_UP_TO, CONTINUE_CHARS = 0.35, 200
STORY_UP_TO, STORY_VERSES = 0.6, 5
ANY_STORY_UP_TO, ANY_STORY_VERSES = 0.68, 8

_DEFINE = (
    "Define '{0}'.", "What does '{0}' mean?", "What does {0} mean?", "What is the meaning of {0}?",
    "Define {0}.", "Give me a definition of {0}.", "Can you explain the word {0}?",
    "What do people mean by {0}?", "Please define the word '{0}'.", "{0}?",
)  # fmt: skip
_NOUN = ("What is {1}?", "What's {1}?", "Explain {0}.", "Tell me about {0}.", "Describe {1}.")
_DETAIL = (
    "Tell me about {0}.", "Explain {0} in detail.", "What are the different meanings of {0}?",
    "Write a paragraph about {0}.", "Tell me everything you know about {0}.", "Discuss {0}.",
    "Write an entry about {0} for an encyclopedia.", "How is the word {0} used?",
)  # fmt: skip
_HACKER = (
    "What do hackers mean by {0}?", "Define the hacker term '{0}'.", "Explain {0} to a programmer.",
    "What is {0} in hacker slang?", "Explain the computing term {0}.", "What does {0} mean?",
    "Write about {0}.", "Define '{0}'.",
)  # fmt: skip
_CYNIC = (
    "Give a cynical definition of {0}.", "How would a cynic define {0}?", "Define {0}, cynically.",
    "What would Ambrose Bierce say about {0}?", "Say something witty about {0}.",
    "Tell me a joke about {0}.",
)  # fmt: skip
_RECITE = ("Recite {0}.", "Read {0}.", "What does {0} say?", "Quote {0}.", "Please recite {0}.")
_STORY = (
    "Tell me a story about {0}.", "Write a passage about {0}.", "Write about {0}.",
    "Tell me about {0}.", "Write a long text about {0}.", "What happened to {0}?",
)  # fmt: skip
_ANY_STORY = (
    "Tell me a story.", "Write a paragraph.", "Write something.", "Tell me something interesting.",
    "Tell me a long story.", "Write an essay.",
)  # fmt: skip
_CONTINUE = ("Continue: {0}", "Continue this text: {0}", "Continue the following. {0}", "{0}")
_BORING = {"God", "Yahweh", "Lord", "Behold", "But", "And", "The", "For", "Then", "Now", "When"}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One user turn and its answer, with the text it came from."""

    source: str
    held_out: bool
    question: str
    answer: str


def is_held_out(unit: str) -> bool:
    """Decide by a stable hash, so that a unit is on one side whatever else the corpus holds."""
    return zlib.crc32(unit.encode()) % HELD_OUT_SHARE == 0


def _article(noun: str) -> str:
    return noun if noun[0].isupper() else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in '.!?”"' else text + "."


def _listing(names: Iterable[str], last: str = "and") -> str:
    *head, tail = list(dict.fromkeys(names))
    return f"{', '.join(head)} {last} {tail}" if head else tail


def _plain_definition(lemma: str, sense: Synset, rng: random.Random) -> str:
    """One sense as a sentence or two: 'A hack is ...', 'To hack is to ...'."""
    word = next((w for w in sense.words if w.lower() == lemma), lemma)
    if sense.part == "noun" and rng.random() < FULL_SENTENCE_SHARE:
        text = f"{_article(word)} is {sense.definition}"
    elif sense.part == "verb" and rng.random() < FULL_SENTENCE_SHARE:
        text = f"to {word} is to {sense.definition}"
    else:
        text = f"{word} ({sense.part}): {sense.definition}"
    parts = [_sentence(text)]
    others = [w for w in sense.words if w.lower() != lemma]
    if others and rng.random() < SYNONYM_SHARE:
        parts.append(f"It is also called {_listing(others[:4], 'or')}.")
    if sense.examples and rng.random() < EXAMPLE_SHARE:
        parts.append(f"For example: “{sense.examples[0].strip()}”.")
    return " ".join(parts)


def _long_definition(lemma: str, senses: list[Synset], rng: random.Random) -> str:
    """All senses of a word: a numbered list, or paragraphs with the words around each sense."""
    if len(senses) > 1 and rng.random() < LIST_SHARE:
        lines = [f"The word “{lemma}” has {len(senses)} meanings:"]
        for number, sense in enumerate(senses, 1):
            example = f" Example: “{sense.examples[0].strip()}”." if sense.examples else ""
            lines.append(f"{number}. ({sense.part}) {_sentence(sense.definition)}{example}")
        return "\n".join(lines)
    paragraphs = []
    for sense in senses[:6]:
        text = _plain_definition(lemma, sense, rng)
        if sense.parents:
            text += f" This is a kind of {_listing(sense.parents[:2])}."
        if sense.children:
            kinds = rng.sample(sense.children, min(6, len(sense.children)))
            text += f" Kinds of it are {_listing(kinds)}."
        paragraphs.append(text)
    return "\n\n".join(paragraphs)


def _sampled_share(senses: list[Synset]) -> float:
    """Take fewer of the rare words (species, places), which would otherwise fill the corpus."""
    if len(senses) > 1:
        return 0.6
    return 0.4 if senses[0].examples else 0.1


def wordnet_dialogues(lemmas: dict[str, list[Synset]], rng: random.Random) -> Iterator[Dialogue]:
    """Short definitions for a sample of the words, longer entries where there is much to say."""
    for lemma in sorted(lemmas):
        if rng.random() > _sampled_share(lemmas[lemma]) or re.search(r"\d|^genus ", lemma):
            continue
        for held_out in (False, True):
            senses = [s for s in lemmas[lemma] if is_held_out(s.key) == held_out]
            if not senses:
                continue
            first = senses[0]
            word = next((w for w in first.words if w.lower() == lemma), lemma)
            forms = _DEFINE + (_NOUN if first.part == "noun" else ())
            question = rng.choice(forms).format(word, _article(word))
            answer = _plain_definition(lemma, first, rng)
            yield Dialogue("wordnet", held_out, question, answer)
            if len(senses) > 1 or len(first.children) > TAXONOMY:
                question = rng.choice(_DETAIL).format(word)
                answer = _long_definition(lemma, senses, rng)
                yield Dialogue("wordnet", held_out, question, answer)


def article_dialogues(
    source: str, articles: Iterable[Article], rng: random.Random
) -> Iterator[Dialogue]:
    """Ask for each entry by its title; cut what is too long into passages that continue it."""
    forms = {"jargon": _HACKER, "devil": _CYNIC, "state": _RECITE}[source]
    for article in articles:
        held_out = is_held_out(source + article.title)
        title = article.title
        if source == "state":
            title = title.replace("Section", "section")
            title = title if title.startswith("the ") else f"{title} of the Constitution"
        passages = list(_passages(article.text, rng))
        for number, passage in enumerate(passages):
            if number == 0:
                yield Dialogue(source, held_out, rng.choice(forms).format(title), passage)
            if number > 0 or len(passage) > CONTINUED_CHARS:
                yield from _continuation(source, passage, rng, held_out=held_out)


def _passages(text: str, rng: random.Random) -> Iterator[str]:
    limit = LONG_ANSWER_CHARS if rng.random() < LONG_ANSWER_SHARE else MAX_ANSWER_CHARS
    passage = ""
    for paragraph in text.split("\n\n"):
        if passage and len(passage) + len(paragraph) > limit:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    if passage:
        yield passage


def _continuation(
    source: str, passage: str, rng: random.Random, *, held_out: bool
) -> Iterator[Dialogue]:
    words = passage.split(" ")
    cut = rng.randint(5, 25)
    if len(words) > cut + 5:
        question = rng.choice(_CONTINUE).format(" ".join(words[:cut]))
        yield Dialogue(source, held_out, question, " ".join(words[cut:]))


def bible_dialogues(verses: list[Verse], rng: random.Random, views: int) -> Iterator[Dialogue]:
    """Partition every chapter into passages ``views`` times, of a different length each time."""
    chapters: dict[tuple[str, int], list[Verse]] = {}
    for verse in verses:
        chapters.setdefault((verse.book, verse.chapter), []).append(verse)
    for _ in range(views):
        for (book, chapter), content in chapters.items():
            held_out = is_held_out(f"{book} {chapter}")
            at = 0
            while at < len(content):
                take = rng.choice((1, 2, 3, 5, 8, 8, 12, 12, 16, 25))
                part = content[at : at + take]
                at += take
                while len(part) > 1 and sum(len(v.text) for v in part) > LONG_ANSWER_CHARS:
                    part, at = part[:-1], at - 1
                yield from _bible_passage(part, rng, held_out=held_out)


def reference(part: list[Verse]) -> str:
    """'Genesis 1:1-3', or 'Psalm 23:1' for a single verse."""
    first, last = part[0], part[-1]
    book = "Psalm" if first.book == "Psalms" else first.book
    span = f"-{last.number}" if last.number != first.number else ""
    return f"{book} {first.chapter}:{first.number}{span}"


def passage_text(part: list[Verse]) -> str:
    """Join verses with a space unless the next one starts a line or a paragraph by itself."""
    text = part[0].text.strip()
    for verse in part[1:]:
        text += verse.text if verse.text.startswith("\n") else " " + verse.text
    return text


def _bible_passage(part: list[Verse], rng: random.Random, *, held_out: bool) -> Iterator[Dialogue]:
    text = passage_text(part)
    kind = rng.random()
    names = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text))
    topic = next((name for name, _ in names.most_common() if name not in _BORING), None)
    if kind < CONTINUE_UP_TO and len(text) > CONTINUE_CHARS:
        yield from _continuation("bible", text, rng, held_out=held_out)
    elif kind < STORY_UP_TO and topic and len(part) >= STORY_VERSES:
        yield Dialogue("bible", held_out, rng.choice(_STORY).format(topic), text)
    elif kind < ANY_STORY_UP_TO and len(part) >= ANY_STORY_VERSES:
        yield Dialogue("bible", held_out, rng.choice(_ANY_STORY), text)
    else:
        yield Dialogue("bible", held_out, rng.choice(_RECITE).format(reference(part)), text)
