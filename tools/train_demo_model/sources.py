"""Readers for the freely licensed texts the demo model learns from (Debian package paths)."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

JARGON = Path("/usr/share/info/jargon.info.gz")
DEVIL = Path("/usr/share/dictd/devil.dict.dz")
CONSTITUTION = Path("/usr/share/state/us-constitution.gz")
DECLARATION = Path("/usr/share/state/us-declaration.gz")
WORDNET = Path("/usr/share/wordnet")
BIBLE = Path("/usr/share/sword/modules/texts/ztext/engWEB2015eb")

# Appendix pieces that the Jargon File reprints from named authors, its front matter, its letters.
_JARGON_SKIPPED = re.compile(
    r"^(Top|The Story of Mel|Bibliography|Contributors|Appendix \w|Revision History|= .* =|"
    r"Pronunciation Guide|Other Lexicon Conventions|Format for New Entries|The Jargon Lexicon)"
)
_DEVIL_HEAD = re.compile(
    r"^([A-Z][A-Z' -]+[A-Z]),? (?=[a-z][a-z.]*\.  )|^([A-Z]{3,})\.\n", re.MULTILINE
)
_SHORTEST_SECTION = 40  # characters; less is a heading without text
_PARTS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclass(frozen=True, slots=True)
class Article:
    """One titled text: a dictionary entry, an essay or a section of a document."""

    title: str
    text: str


@dataclass(slots=True)
class Synset:
    """One WordNet sense: its words, its gloss and the names around it."""

    key: str
    part: str
    words: list[str]
    definition: str
    examples: list[str]
    parents: list[str] = field(default_factory=list)
    children: list[str] = field(default_factory=list)


def _unzip(path: Path) -> str:
    with gzip.open(path) as stream:
        return stream.read().decode("utf-8", errors="replace")


def reflow(text: str, verse_margin: int = 4) -> str:
    """Join hard-wrapped prose; paragraphs indented by ``verse_margin`` keep their line breaks."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        # The first line of a dictionary entry has lost its indent together with its headword.
        margin = min(len(line) - len(line.lstrip()) for line in lines[1:] or lines)
        if margin < verse_margin:
            paragraphs.append(re.sub(r"\s+", " ", " ".join(lines)).strip())
        else:
            paragraphs.append("\n".join(line.strip() for line in lines))
    return "\n\n".join(paragraphs)


def read_jargon() -> Iterator[Article]:
    """Yield the entries and essays of the Jargon File 4.0.0 without its cross-reference braces."""
    for node in _unzip(JARGON).split("\x1f")[1:]:
        found = re.search(r"Node: ([^,\n]+),", node)
        if not found or _JARGON_SKIPPED.match(found.group(1)) or "* Menu:" in node:
            continue
        body = node.split("\n", 2)[2]
        body = re.sub(r"\n=+\n", "\n", body).strip("\n")
        head = re.match(r":(.+?):\s+", body, re.DOTALL)
        if not head:
            continue
        title = re.sub(r"\s+", " ", head.group(1)).strip(": ")
        body = re.sub(r"\{+([^{}]+)\}+", r"\1", body[head.end() :])
        body = re.sub(r"^(/[^/\n]{1,40}/,? *(or /[^/\n]{1,40}/,? *)*)+", "", body)
        body = re.sub(r"\[\d{4}\]|\*(\w[^*\n]{0,40})\*", r"\1", body)
        body = re.sub(r"^(/\w[\w., ]*\./(, | and )?)+\s*", "", body)
        yield Article(title, reflow(body, verse_margin=5))


def read_devil() -> Iterator[Article]:
    """Yield the entries of The Devil's Dictionary."""
    text = _unzip(DEVIL)
    text = text[text.index("\nABASEMENT") : text.rindex("abcdefghijkl")]
    heads = list(_DEVIL_HEAD.finditer(text))
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : following.start() if following else len(text)]
        body = re.sub(r"\A([a-z]+\. ?)+\s+", "", body)
        title = (head.group(1) or head.group(2)).lower()
        yield Article(title, reflow(body))


def read_state_papers() -> Iterator[Article]:
    """Yield the sections of the United States Constitution and the Declaration of Independence."""
    article = section = ""
    body: list[str] = []
    for line in [*_unzip(CONSTITUTION).split("\n")[1:], "Article end"]:
        heading = re.match(r"(Preamble|Article \w+|Amendments?( \w+)?)\s*$", line)
        subheading = re.match(r"(Section \d+)\s*$", line)
        if not heading and not subheading:
            body.append(line)
            continue
        text = reflow("\n".join(body))
        if len(text) > _SHORTEST_SECTION:
            yield Article(" ".join(filter(None, (article, section))), text)
        body = []
        article = heading.group(1) if heading else article
        section = subheading.group(1) if subheading else ""
    declaration = _unzip(DECLARATION)
    start = declaration.index("When in the Course")
    yield Article("the Declaration of Independence", reflow(declaration[start:]))


def read_wordnet() -> dict[str, list[Synset]]:
    """Return lower-cased lemma -> its senses, the most frequent first, nouns before verbs."""
    synsets: dict[str, Synset] = {}
    links: list[tuple[str, str]] = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text("utf-8").splitlines():
            if not line.startswith("  "):
                synset, parents = _parse_synset(line, part)
                synsets[synset.key] = synset
                links += [(synset.key, parent) for parent in parents]
    for child, parent in links:
        synsets[child].parents.append(synsets[parent].words[0])
        synsets[parent].children.append(synsets[child].words[0])
    senses: dict[str, list[Synset]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"index.{part}").read_text("utf-8").splitlines():
            if not line.startswith("  "):
                fields = line.split()
                offsets = fields[-int(fields[2]) :]
                lemma = fields[0].replace("_", " ")
                senses.setdefault(lemma, []).extend(synsets[part + key] for key in offsets)
    return senses


def _parse_synset(line: str, part: str) -> tuple[Synset, list[str]]:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    parents = [
        part + pointers[at + 1]
        for at, field_ in enumerate(pointers)
        if field_ in ("@", "@i") and pointers[at + 2] == part[0]
    ]
    examples = re.findall(r'"([^"]+)"', gloss)
    definition = re.split(r'; "|"', gloss)[0].strip(' ;"')
    return Synset(part + fields[0], _PARTS[fields[2]], words, definition, examples), parents
