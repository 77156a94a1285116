"""The tensor functions against their definitions."""

import numpy as np
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from penstock.engine.sampling_ops import argmax, pick, truncate
from penstock.engine.sampling_state import stream_key, uniforms


def random_probs(seed: int, rows: int, vocab: int, scale: float) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    return logits, logits.softmax(-1)


def column(value: float, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, 1), value, dtype=dtype)


@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([5, 100, 700, 4096]),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
    top_k=st.sampled_from([None, 1, 3, 40, 600]),
    top_p=st.sampled_from([None, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([None, 0.01, 0.3]),
)
@settings(max_examples=120, deadline=None)
def test_masks_are_those_of_hugging_face(
    seed: int,
    vocab: int,
    scale: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    rows = 3
    logits, probs = random_probs(seed, rows, vocab, scale)
    assume(all(len(row.unique()) == vocab for row in probs))  # ties: see the next test
    limit = vocab if top_k is None else min(top_k, vocab)
    kept = truncate(
        probs,
        top_k=column(limit, rows, torch.int64),
        top_p=column(2.0 if top_p is None else top_p, rows, torch.float64),
        min_p=column(min_p or 0.0, rows, torch.float32),
        head=0 if top_k is None and top_p is None else limit,
    )
    expected = logits
    if top_k is not None:
        expected = TopKLogitsWarper(limit)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(None, expected)
    differing = (kept > 0) != torch.isfinite(expected)
    # transformers adds up in float32, so its nucleus may differ in the value on the edge.
    assert int(differing.sum(-1).max()) <= (1 if top_p is not None else 0)
    assert torch.equal(kept[kept > 0], probs[kept > 0])


def test_equal_probabilities_stay_together() -> None:
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    kept = truncate(
        probs,
        top_k=column(2, 1, torch.int64),
        top_p=column(2.0, 1, torch.float64),
        min_p=column(0.0, 1, torch.float32),
        head=2,
    )
    assert torch.equal(kept, probs)


@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([3, 128, 129, 500, 4096]),
    scale=st.sampled_from([0.1, 3.0]),
    keep=st.integers(1, 6),
)
@settings(max_examples=80, deadline=None)
def test_a_row_is_cut_as_if_it_were_alone(seed: int, vocab: int, scale: float, keep: int) -> None:
    """Rows that need a full sort, a short head or nothing at all do not disturb each other."""
    _, probs = random_probs(seed, 5, vocab, scale)
    columns = {
        "top_k": torch.tensor([[vocab], [min(keep, vocab)], [vocab], [vocab], [vocab // 2 + 1]]),
        "top_p": torch.tensor([[0.95], [2.0], [2.0], [0.01], [0.9]], dtype=torch.float64),
        "min_p": torch.tensor([[0.0], [0.0], [0.2], [0.0], [0.0]]),
    }
    together = truncate(probs, **columns, head=vocab)
    heads = [vocab, min(keep, vocab), 0, vocab, vocab // 2 + 1]
    for row, head in enumerate(heads):
        part = slice(row, row + 1)
        alone = truncate(probs[part], **{k: v[part] for k, v in columns.items()}, head=head)
        assert torch.equal(together[part], alone)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 3.0]), min_size=1, max_size=600),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.just(1.0 - 2.0**-52), st.just(0.0)),
)
@example(weights=[0.0] * 300 + [1.0, 0.0], uniform=0.0)
@example(weights=[1.0] + [0.0] * 300, uniform=1.0 - 2.0**-52)
@settings(max_examples=200, deadline=None)
def test_pick_inverts_the_distribution_function(weights: list[float], uniform: float) -> None:
    assume(sum(weights) > 0)
    probs = torch.tensor([weights, weights[::-1]], dtype=torch.float32)
    picked = pick(probs, torch.tensor([uniform, uniform], dtype=torch.float64))
    for row, index in zip(probs.double().numpy(), picked.tolist(), strict=True):
        assert row[index] > 0
        edges = np.cumsum(row)
        slack = 1e-6 * edges[-1]
        assert edges[index] - row[index] - slack <= uniform * edges[-1] <= edges[index] + slack


def test_pick_reaches_small_probabilities_behind_large_ones() -> None:
    """The tail of a long row keeps its share, which float32 sums over the row would lose."""
    vocab = 200_000
    probs = torch.full((1, vocab), 1e-9)
    probs[0, 0] = 1.0
    uniform = torch.linspace(0.99985, 0.99999, 40, dtype=torch.float64)
    picked = pick(probs.expand(40, vocab), uniform)
    expected = (uniform * (1.0 + (vocab - 1) * 1e-9) - 1.0) / 1e-9
    assert float((picked - expected).abs().max()) < 200


@given(seed=st.integers(0, 100), rows=st.integers(0, 5), vocab=st.integers(1, 50))
def test_argmax_is_the_one_of_torch(seed: int, rows: int, vocab: int) -> None:
    logits, _ = random_probs(seed, rows, vocab, 1.0)
    assert argmax(logits).tolist() == logits.argmax(-1).tolist()


def test_uniforms_are_splitmix64() -> None:
    """The reference stream for seed 1234567, published with the generator."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = uniforms(np.full(3, 1234567, dtype=np.uint64), np.arange(3, dtype=np.uint64))
    assert got.tolist() == [(value >> 12) * 2.0**-52 for value in reference]
    assert 0 <= got.min() <= got.max() < 1


def test_stream_keys_differ() -> None:
    keys = {stream_key(seed, 0, "a") for seed in range(1000)}
    keys |= {stream_key(None, seed, name) for seed in range(10) for name in "abc"}
    assert len(keys) == 1030
    assert stream_key(5, 0, "a") == stream_key(5, 1, "b")
