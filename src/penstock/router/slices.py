"""Making one answer out of slices."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from penstock.router.answer import Answer
from penstock.router.failures import BackendError
from penstock.router.pool import Pool, Stay, Ticket


async def run(pool: Pool, ticket: Ticket, answer: Answer, headers: Mapping[str, str]) -> None:
    """Make the answer, until it has a finish reason.

    Args:
        headers: of the client, for the backends.

    Raises:
        ApiError: nobody goes on with it.
    """
    while True:
        await pool.stay(ticket, lambda stay: _slice(pool, stay, answer, headers))
        if answer.finish is not None:
            return
        pool.back(ticket, answer.generated)


async def _slice(pool: Pool, stay: Stay, answer: Answer, headers: Mapping[str, str]) -> None:
    """Have a backend make the next slice; what has come counts, however it ends."""
    if answer.finish is not None:
        return
    tokens = _tokens(stay, answer)
    if tokens < 1:
        answer.close()
        return
    answer.begin(tokens)
    backend = stay.backend
    body = answer.body.slice_body(
        answer.continuation(), tokens, answer.generated, ids=backend.returns_ids
    )
    finish = None
    try:
        async with contextlib.aclosing(backend.completion(body, headers)) as pieces:
            async for piece in pieces:
                if not answer.take(piece):
                    return
                finish = piece.finish or finish
                pool.progress(stay, answer.generated)
    except BackendError:
        if finish is None and not answer.full:
            raise
    finally:
        if answer.finish is None:
            answer.end_slice(finish)
            pool.progress(stay, answer.generated)


def _tokens(stay: Stay, answer: Answer) -> int:
    """Most tokens of this slice; less than 1 if the backend's context is full."""
    left = answer.body.cap - answer.generated
    tokens = min(left, stay.slice.cap - stay.slice.generated + answer.dropped)
    longest = stay.backend.max_tokens
    if longest is None or not answer.generated or not answer.prompt_tokens:
        return tokens
    return min(tokens, longest - answer.prompt_tokens - answer.generated)
