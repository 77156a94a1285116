"""Prompts in an order that is made anew before every step."""

from __future__ import annotations

import math

import numpy as np

from penstock.core.books import Books
from penstock.core.entry import Entry
from penstock.core.policies.base import RankPolicy
from penstock.core.snapshot import Prompts


def ranked(books: Books, policy: RankPolicy, now: float) -> list[Entry]:
    """Those in prefill and those that wait, the first first; the demoted come last."""
    entries = [*books.prefill.values(), *books.queue]
    if len(entries) < 2:
        return entries
    order = policy.rank(_prompts(books, entries), now)
    found = [entries[row] for row in order.tolist()]
    if any(entry.demoted for entry in found):
        found.sort(key=lambda entry: entry.demoted)
    return found


def _prompts(books: Books, entries: list[Entry]) -> Prompts:
    rows = np.array(
        [
            (
                e.seq,
                e.request.prompt_tokens + e.generated,
                e.computed or max(e.imported, books.cached_tokens(e) if e.request.prefix else 0),
                e.generated,
            )
            for e in entries
        ],
        dtype=np.int64,
    )
    times = [
        (e.request.arrival, math.inf if e.request.slo.ttft is None else e.request.slo.ttft)
        for e in entries
    ]
    arrival, ttft = np.array(times, dtype=np.float64).T
    seq, tokens, computed, generated = rows.T
    return Prompts(seq, arrival, ttft, tokens, computed, generated)
