"""Building the kernels, and what happens where that is not possible."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine import kernels
from penstock.engine.kernels import build


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a dispatcher that has not chosen yet; gives the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PENSTOCK_KERNELS", raising=False)
    kernels.compiled.cache_clear()
    yield tmp_path / "penstock"
    kernels.compiled.cache_clear()


def compiler_or_skip() -> str:
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def test_a_second_process_finds_the_library_of_the_first(fresh: Path) -> None:
    compiler_or_skip()
    command = [sys.executable, "-m", "penstock.engine.kernels.build"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(run.stdout.strip())
    assert path.parent == fresh
    written = path.stat().st_mtime_ns
    assert build.library() == path
    assert path.stat().st_mtime_ns == written
    assert [entry.name for entry in fresh.iterdir()] == [path.name]


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_pytorch_does_the_work_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert kernels.backend() == "torch"
        assert kernels.backend() == "torch"
    (record,) = caplog.records
    assert "no-such-compiler" in record.getMessage()
    caches = torch.zeros(2, 2, 1, 4, 8)
    key = torch.randn(3, 1, 8)
    kernels.store_kv(key, key, *caches, torch.tensor([0, 1, 5]))
    assert torch.equal(caches[0, 1, 0, 1], key[2, 0])


def test_a_failing_compiler_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "flags", lambda: ["-fno-such-flag"])
    compiler_or_skip()
    with pytest.raises(build.BuildError, match="no-such-flag"):
        build.library()
    assert list(fresh.iterdir()) == []


@pytest.mark.usefixtures("fresh")
def test_forced_native_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "native")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        kernels.backend()


def test_forced_torch_builds_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "torch")
    assert kernels.backend() == "torch"
    assert not fresh.exists()


@pytest.mark.usefixtures("fresh")
def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"PENSTOCK_KERNELS is 'cuda'; it must be 'native' or"):
        kernels.backend()


@pytest.mark.usefixtures("fresh")
def test_the_name_depends_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler_or_skip()
    here = build.fingerprint(compiler)
    monkeypatch.setattr(build, "_cpu_flags", lambda: "another CPU")
    assert build.fingerprint(compiler) != here


@pytest.mark.usefixtures("fresh")
def test_without_a_home_pytorch_does_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler_or_skip()
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a user that the system does not know
    with caplog.at_level(logging.WARNING):
        assert kernels.backend() == "torch"
    (record,) = caplog.records
    assert "set HOME or XDG_CACHE_HOME" in record.getMessage()
