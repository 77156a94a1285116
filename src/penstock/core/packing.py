"""Decode steps in which not everybody advances: asking who, and pausing the others."""

from __future__ import annotations

import math

import numpy as np

from penstock.core.books import Books
from penstock.core.entry import Entry
from penstock.core.policies.base import PackPolicy
from penstock.core.snapshot import Decoding


def pack(books: Books, policy: PackPolicy, now: float) -> None:
    """Let those decode whom the policy chooses, and pause the others."""
    advanced = list(books.decode.entries)
    for entry in advanced:
        if entry.first_at is None and entry.sampled_in <= books.confirmed.number:
            entry.first_at = now
    members = [*advanced, *books.paused.values()]
    if len(members) < 2:
        resume_all(books)
        return
    chosen = policy.choose(_decoding(books, members, len(advanced), now), now)
    if chosen is None:
        resume_all(books)
        return
    going = np.zeros(len(members), dtype=bool)
    going[chosen] = True
    for row, entry in enumerate(members):
        if row < len(advanced):
            if not going[row]:
                books.pause(entry, now)
        elif going[row]:
            books.resume(entry)


def resume_all(books: Books) -> None:
    """Nobody sits out."""
    for entry in list(books.paused.values()):
        books.resume(entry)


def _decoding(books: Books, members: list[Entry], advanced: int, now: float) -> Decoding:
    """The columns of these; the first ``advanced`` of them had a token in the last step."""
    ticks = books.decode.ticks
    slos = [entry.request.slo for entry in members]
    generated = np.array(
        [
            entry.base + ticks if row < advanced else entry.generated
            for row, entry in enumerate(members)
        ],
        dtype=np.int64,
    )
    prompt = np.array([entry.request.prompt_tokens for entry in members], dtype=np.int64)
    latest = np.full(len(members), now)
    latest[advanced:] = [entry.latest_at for entry in members[advanced:]]
    return Decoding(
        context=prompt + generated,
        generated=generated,
        first=np.array([now if e.first_at is None else e.first_at for e in members]),
        latest=latest,
        tpot=np.array([math.inf if slo.tpot is None else slo.tpot for slo in slos]),
        gap=np.array([math.inf if slo.gap is None else slo.gap for slo in slos]),
    )
