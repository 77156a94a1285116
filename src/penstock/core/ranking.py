"""Prompts in an order that is made anew before every step."""

from __future__ import annotations

import numpy as np

from penstock.core.books import Books
from penstock.core.entry import Entry
from penstock.core.policies.base import RankPolicy
from penstock.core.prompt_table import rows_of
from penstock.core.snapshot import Prompts


def ranked(books: Books, policy: RankPolicy, now: float) -> list[Entry]:
    """Those in prefill and those that wait, the first first; the demoted come last."""
    assert books.queue.table is not None, "the queue keeps a table where the policy has a rank"
    begun, waiting = rows_of([*books.prefill.values()]), books.queue.table.rows()
    entries = begun.entries + waiting.entries
    if len(entries) < 2:
        return entries
    numbers = np.concatenate((begun.numbers, waiting.numbers), axis=1)
    arrival, ttft = np.concatenate((begun.times, waiting.times), axis=1)
    seq, tokens, computed, generated, demoted = numbers
    if books.capabilities.prefix_cache:
        for row, entry in enumerate(waiting.entries, len(begun.entries)):
            if entry.request.prefix:
                computed[row] = max(computed[row], books.cached_tokens(entry))
    order = policy.rank(Prompts(seq, arrival, ttft, tokens, computed, generated), now)
    if demoted.any():
        order = order[np.argsort(demoted[order], kind="stable")]
    return [entries[row] for row in order.tolist()]
