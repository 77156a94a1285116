"""Choosing tokens, as pure tensor functions.  A row is one request.

Each function treats every row by itself, so that a request's tokens depend neither on
the rest of the batch nor on its place in it.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Rows: TypeAlias = Tensor | slice
"""Which rows of a batch a parameter is for: an index tensor, or ``slice(None)`` for all."""

_BLOCK = 128


def argmax(scores: Tensor) -> Tensor:
    """Index of the largest score of each row of ``[n, vocab]``, as int64 ``[n]``.

    On CPUs by numpy, whose vectorised argmax is about 14 times faster than PyTorch's.
    """
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def replace_rows(full: Tensor, rows: Rows, part: Tensor) -> Tensor:
    """A copy of ``full`` whose ``rows`` are ``part``; the caller's tensor stays as it was."""
    if isinstance(rows, slice):
        return part
    return full.index_copy(0, rows, part)


def penalize(
    scores: Tensor,
    in_prompt: Tensor,
    counts: Tensor,
    *,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Scores after the three penalties.

    Args:
        scores: ``[n, vocab]``.
        in_prompt: bool ``[n, vocab]``.
        counts: how often each token is in the output, int32 ``[n, vocab]``.
        repetition: ``[n, 1]``; as in Hugging Face, for tokens of prompt or output: a
            positive score is divided by it, a negative one multiplied.
        presence: ``[n, 1]``; as in the OpenAI API, taken off once for a token of the output.
        frequency: ``[n, 1]``; as in the OpenAI API, taken off once per occurrence there.
    """
    in_output = counts > 0
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(in_prompt | in_output, repeated, scores)
    return scores - frequency * counts - presence * in_output


def truncate(probs: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor, head: int) -> Tensor:
    """Probabilities with everything outside top-k, top-p and min-p set to 0.

    The rows are not normalised again, :func:`pick` does not need it.  Top-p looks at what
    top-k left, as in Hugging Face.  Equal probabilities stay or go together.

    Args:
        probs: ``[n, vocab]``, each row with sum 1.
        top_k: int64 ``[n, 1]``, from 1 to vocab.
        top_p: ``[n, 1]``; more than 1 is off.
        min_p: ``[n, 1]``, relative to the row's largest probability.
        head: how many of the largest probabilities surely decide every row; 0 if top-k
            and top-p are off in all of them.
    """
    floor = min_p * probs.amax(dim=-1, keepdim=True)
    if head:
        floor = torch.maximum(floor, _smallest_kept(probs, top_k, top_p, head))
    return probs.masked_fill(probs < floor, 0.0)


def _smallest_kept(probs: Tensor, top_k: Tensor, top_p: Tensor, head: int) -> Tensor:
    """Smallest probability that top-k and top-p keep, ``[n, 1]``; 0 where both are off.

    A value is kept while the mass before it is less than ``top_p`` of the mass of the top k.
    """
    largest = _largest(probs, head)
    mass = largest.cumsum(dim=-1, dtype=torch.float64)
    limited = top_k < probs.shape[-1]
    last = top_k.clamp(max=head) - 1
    total = torch.where(limited, mass.gather(-1, last), 1.0)
    rank = torch.searchsorted(mass, top_p * total)
    floor = largest.gather(-1, torch.minimum(rank, last))
    return floor.masked_fill(~limited & (top_p > 1.0), 0.0)


def _largest(probs: Tensor, count: int) -> Tensor:
    """The ``count`` largest values of each row, in descending order.

    On CPUs by numpy, whose vectorised sort is more than 20 times faster than PyTorch's.
    """
    if probs.device.type != "cpu":
        return probs.topk(count).values
    ascending = np.sort(probs.numpy(), axis=-1)
    return torch.from_numpy(ascending[:, : -count - 1 : -1].copy())


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index per row of ``[n, vocab]`` by inverting the distribution function.

    One uniform number per row instead of one per token: exact, and several times cheaper
    than perturbing every score.  Sums run in two levels, over blocks and then inside the
    chosen block, which keeps float64 away from the large tensor.

    Args:
        probs: non-negative float32, a positive sum in each row; normalisation is not needed.
        uniform: float64 ``[n]`` in [0, 1).
    """
    rows, vocab = probs.shape
    if vocab % _BLOCK:
        probs = torch.nn.functional.pad(probs, (0, _BLOCK - vocab % _BLOCK))
    blocks = probs.view(rows, -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float32).double()
    edges = sums.cumsum(dim=-1)
    target = uniform[:, None] * edges[:, -1:]
    block = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[-1] - 1)
    mass = sums.gather(-1, block)
    # Where in its block the target lies; strictly below 1, so that no empty tail is hit.
    inside = ((target - edges.gather(-1, block) + mass) / mass).clamp_(0.0, 1.0 - 2.0**-50)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    steps = chosen.cumsum(dim=-1, dtype=torch.float64)
    offset = torch.searchsorted(steps, inside * steps[:, -1:], right=True).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + offset)[:, 0].clamp_(max=vocab - 1)
