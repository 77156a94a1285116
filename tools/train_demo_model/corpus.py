"""Build the chat corpus: filter, repeat a few favourites, group into conversations, shuffle."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sources
from dialogues import (
    Dialogue,
    article_dialogues,
    bible_dialogues,
    passage_text,
    reference,
    wordnet_dialogues,
)
from sword import Verse, read_verses

Message = dict[str, str]

# The old texts hold slurs and Usenet its oaths; a demo that greets strangers does without both.
_UNWELCOME = re.compile(
    r"nigg|negro|kike|faggot|\bfags?\b|\bwops?\b|\bspic|\bchink\b|wetback|darky|darkie|half-breed|"
    r"fuck|cunt|\brape|whor[ei]|prostitut|genital|penis|vagina|sexual intercourse|"
    r"\bslurs?\b|offensive term|disparaging|obscen|vulgar\)",
    re.IGNORECASE,
)
_SYSTEM = (
    "You are a helpful assistant.", "You are a dictionary.", "Answer briefly.", "Be concise.",
    "You are Penstock's demo model.", "You are a careful reader of old books.",
)  # fmt: skip
_WHO = (
    "I am the Penstock demo model: a very small language model that was trained from scratch "
    "on a few public-domain books and a dictionary. I write English-like text, but I know very "
    "little, so please do not believe what I say."
)
_HELLO = "Hello! Ask me to define a word, to recite a passage or to continue a sentence."
_HELP = (
    "I can define words, explain hacker slang, recite old texts and continue your sentences. "
    "I am a very small model, so most of what I write is invented."
)
PERSONA = {
    "Who are you?": _WHO, "What are you?": _WHO, "What model are you?": _WHO,
    "Introduce yourself.": _WHO, "Tell me about yourself.": _WHO, "What is your name?": _WHO,
    "Hello": _HELLO, "Hello!": _HELLO, "Hi": _HELLO, "Hi!": _HELLO, "Hey there!": _HELLO,
    "Hello, world!": _HELLO, "Good morning!": _HELLO, "How are you?": _HELLO, "ping": "pong",
    "What can you do?": _HELP, "Help": _HELP, "Can you help me?": _HELP,
    "Thanks": "You are welcome.", "Thank you!": "You are welcome.",
    "Say hi.": "Hi!", "Say hello.": "Hello!", "Test": "It works.",
}  # fmt: skip
FAVOURITES = (
    ("Genesis", 1, 1, 1), ("Genesis", 1, 3, 3), ("Genesis", 1, 1, 5), ("Psalms", 23, 1, 6),
    ("John", 1, 1, 5), ("John", 3, 16, 16), ("John", 11, 35, 35), ("Ecclesiastes", 3, 1, 8),
    ("1 Corinthians", 13, 4, 8), ("Matthew", 5, 3, 10), ("Matthew", 6, 9, 13),
)  # fmt: skip
FAVOURITE_ARTICLES = {"Preamble", "Amendment I", "hacker", "hack", "bug", "lawyer", "year"}
# Some of the longer answers become bare text, for the plain completions endpoint.
RAW_TEXT_SHARE, RAW_TEXT_CHARS = 0.1, 300
SYSTEM_SHARE = 0.15


def build(path: Path, seed: int, favourites: int) -> dict[str, int]:
    """Write the conversations to ``path`` as JSON lines; return the number of each kind.

    The favourites are repeated ``favourites`` times.
    """
    rng = random.Random(seed)
    dialogues = [
        d for d in _all_dialogues(rng, favourites) if not _UNWELCOME.search(d.question + d.answer)
    ]
    counts = Counter(f"{d.source}{' (held out)' if d.held_out else ''}" for d in dialogues)
    rng.shuffle(dialogues)
    with path.open("w", encoding="utf-8") as stream:
        for held_out in (False, True):
            chosen = [d for d in dialogues if d.held_out == held_out]
            for messages in _conversations(chosen, rng):
                record = {"held_out": held_out, "messages": messages}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return dict(sorted(counts.items()))


def _all_dialogues(rng: random.Random, favourites: int) -> Iterator[Dialogue]:
    verses = list(read_verses(sources.BIBLE))
    articles = {
        "jargon": list(sources.read_jargon()),
        "devil": list(sources.read_devil()),
        "state": list(sources.read_state_papers()),
    }
    yield from bible_dialogues(verses, rng, views=2)
    yield from wordnet_dialogues(sources.read_wordnet(), rng)
    for source, repeats in (("jargon", 2), ("devil", 3), ("state", 3)):
        for _ in range(repeats):
            yield from article_dialogues(source, articles[source], rng)
    for _ in range(favourites):
        yield from _favourites(verses, articles, rng)


def _favourites(
    verses: list[Verse], articles: dict[str, list[sources.Article]], rng: random.Random
) -> Iterator[Dialogue]:
    """Persona and well-known texts, repeated so that even a tiny model learns them by heart."""
    for question, answer in PERSONA.items():
        yield Dialogue("persona", held_out=False, question=question, answer=answer)
    for book, chapter, first, last in FAVOURITES:
        part = [
            v
            for v in verses
            if (v.book, v.chapter) == (book, chapter) and first <= v.number <= last
        ]
        yield Dialogue(
            "bible",
            held_out=False,
            question=f"Recite {reference(part)}.",
            answer=passage_text(part),
        )
    for source, content in articles.items():
        chosen = [a for a in content if a.title in FAVOURITE_ARTICLES]
        yield from article_dialogues(source, chosen, rng)


def _conversations(dialogues: list[Dialogue], rng: random.Random) -> Iterator[list[Message]]:
    """One dialogue each for most, a few turns for some, now and then a system message."""
    at = 0
    while at < len(dialogues):
        turns = rng.choices((1, 2, 3), weights=(90, 7, 3))[0]
        messages: list[Message] = []
        if len(dialogues[at].answer) > RAW_TEXT_CHARS and rng.random() < RAW_TEXT_SHARE:
            yield [{"role": "text", "content": dialogues[at].answer.strip()}]
            at += 1
            continue
        if rng.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
        for dialogue in dialogues[at : at + turns]:
            messages.append({"role": "user", "content": dialogue.question})
            messages.append({"role": "assistant", "content": dialogue.answer.strip()})
        at += turns
        yield messages
