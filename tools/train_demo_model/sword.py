"""Read the plain text of a SWORD ``zText`` Bible module with the standard library only."""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CHAPTER = re.compile(r'<chapter n="(\d+)" osisID="\w+\.\d+" sID=')
_BOOK = re.compile(r'<milestone n="([^"]+)" type="x-usfm-h"/>')
_DROPPED = re.compile(r"<(note|title|rdg|speaker)\b[^>]*>.*?</\1>", re.DOTALL)
_PARAGRAPH = re.compile(r'<(div sID="[^"]*" type="x-p"|lb type="x-p"|lg sID="[^"]*")/>')
_LINE = re.compile(r'<l (level="\d+" )?sID="[^"]*"[^>]*/>')
_TAG = re.compile(r"<[^>]+>")


@dataclass(frozen=True, slots=True)
class Verse:
    """One verse; a line break in ``text`` is a line of verse, a blank line a paragraph."""

    book: str
    chapter: int
    number: int
    text: str


def read_verses(module: Path) -> Iterator[Verse]:
    """Yield every non-empty verse of both testaments in canonical order."""
    for testament in ("ot", "nt"):
        yield from _verses_of(module, testament)


def _verses_of(module: Path, testament: str) -> Iterator[Verse]:
    book, chapter, number = "", 0, 0
    for entry in _entries(module, testament):
        for name in _BOOK.findall(entry):
            book, chapter = html.unescape(name), 0
        opened = _CHAPTER.search(entry)
        if opened:
            chapter, number = int(opened.group(1)), 0
            continue
        if chapter == 0:
            continue
        number += 1
        text = plain_text(entry)
        if text.strip():
            yield Verse(book, chapter, number, text)


def _entries(module: Path, testament: str) -> Iterator[str]:
    """Yield the marked-up text of each slot: ``bzs`` finds blocks, ``bzv`` slots within them."""
    block_table, slot_table, packed = (
        (module / f"{testament}.{suffix}").read_bytes() for suffix in ("bzs", "bzv", "bzz")
    )
    blocks = [
        zlib.decompress(packed[start : start + size]) if size else b""
        for start, size, _ in struct.iter_unpack("<III", block_table)
    ]
    for block, start, size in struct.iter_unpack("<IIH", slot_table):
        yield blocks[block][start : start + size].decode("utf-8")


def plain_text(markup: str) -> str:
    """Strip OSIS markup, footnotes and headings; keep verse lines and paragraph breaks."""
    text = _DROPPED.sub(" ", markup)
    text = _PARAGRAPH.sub("\n\n", text)
    text = _LINE.sub("\n", text)
    text = html.unescape(_TAG.sub("", text))
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r" ([,.;:?!\u2019\u201d])", r"\1", text)
    leading = "\n\n" if text.startswith("\n\n") else "\n" if text.startswith("\n") else ""
    return leading + re.sub(r"\n{3,}", "\n\n", text.strip())
