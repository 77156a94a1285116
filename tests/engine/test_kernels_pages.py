"""Memory on large pages: advice that changes no value, and chunks that go with what is in them."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from penstock.engine.kernels import pages
from penstock.engine.kernels.pages import Chunks, advise


@pytest.mark.parametrize("size", [0, 1, 5_000, 1 << 20])
def test_advice_leaves_the_values(size: int) -> None:
    tensor = torch.arange(size)
    assert advise(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size))


def test_advice_is_for_large_pages_that_are_all_the_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: asked.append(call) or 0)
    monkeypatch.setattr(pages.mmap, "MADV_HUGEPAGE", 14, raising=False)
    large = 2 << 20
    advise(torch.empty(large - 1, dtype=torch.uint8))
    assert asked == []
    tensor = torch.empty(4 * large, dtype=torch.uint8)
    advise(tensor)
    ((first, size, advice),) = asked
    begin = tensor.data_ptr()
    assert advice == 14
    assert first % large == size % large == 0
    assert begin <= first
    assert first + size <= begin + 4 * large
    assert size >= 3 * large


def test_without_such_advice_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(pages, "_madvise", lambda: pytest.fail("asked"))
    advise(torch.empty(1 << 20))


def test_pieces_lie_apart_and_on_lines() -> None:
    chunks = Chunks()
    like = torch.empty(0, dtype=torch.bfloat16)
    pieces = [chunks.take(like, count) for count in (3, 1_000, 31, 64)]
    for number, piece in enumerate(pieces):
        piece.tensor.fill_(number)
    for number, piece in enumerate(pieces):
        assert torch.all(piece.tensor == number)
        assert piece.tensor.data_ptr() % 64 == pieces[0].tensor.data_ptr() % 64
    one = pieces[0].tensor.untyped_storage().data_ptr()
    assert all(piece.tensor.untyped_storage().data_ptr() == one for piece in pieces)


def test_a_piece_larger_than_a_chunk_and_another_dtype_get_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "_CHUNK", 1_024)
    chunks = Chunks()
    like = torch.empty(0, dtype=torch.bfloat16)
    large = chunks.take(like, 5_000)
    small = chunks.take(like, 5)
    other = chunks.take(torch.empty(0), 7)
    assert [len(piece.tensor) for piece in (large, small, other)] == [5_000, 5, 7]
    assert other.tensor.dtype == torch.float32
    storages = {piece.tensor.untyped_storage().data_ptr() for piece in (large, small, other)}
    assert len(storages) == 3


def test_what_the_last_pieces_leave_is_used_again() -> None:
    chunks = Chunks()
    like = torch.empty(0, dtype=torch.bfloat16)
    first, second, third = (chunks.take(like, 100) for _ in range(3))
    places = [piece.tensor.data_ptr() for piece in (first, second, third)]
    # A piece in the middle leaves a hole until those behind it go as well.
    del second
    fourth = chunks.take(like, 10)
    assert fourth.tensor.data_ptr() > places[2]
    del third, fourth
    assert chunks.take(like, 100).tensor.data_ptr() == places[1]
    assert first.tensor.data_ptr() == places[0]


def test_a_chunk_goes_with_its_last_piece() -> None:
    chunks = Chunks()
    like = torch.empty(0, dtype=torch.bfloat16)
    first, second = chunks.take(like, 10), chunks.take(like, 10)
    chunk = StorageWeakRef(first.tensor.untyped_storage())
    del first
    assert not chunk.expired()
    del second
    assert chunk.expired()
