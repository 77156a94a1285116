"""`import penstock`: quick, light, and with the names that it promises."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import penstock

LIGHT = sorted(set(penstock.__all__) - {"LLM"})


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_import_is_quick_and_light() -> None:
    """The best of five, since a busy machine can only make it slower."""
    script = (
        "import sys, time\n"
        "before = time.perf_counter()\n"
        "import penstock\n"
        "print(time.perf_counter() - before)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'starlette'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    assert min(float(run(script)) for _ in range(5)) < 0.15


@pytest.mark.parametrize("name", penstock.__all__)
def test_every_exported_name_exists(name: str) -> None:
    if name == "LLM":
        pytest.importorskip("torch", reason="LLM runs models, which needs penstock[engine]")
    assert getattr(penstock, name)


def test_scheduling_names_need_no_torch() -> None:
    names = ", ".join(LIGHT)
    run(f"import sys\nfrom penstock import {names}\nassert 'torch' not in sys.modules")


def test_dir_lists_the_exports() -> None:
    assert set(dir(penstock)) == set(penstock.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gate'"):
        _ = penstock.gate


def test_version_matches_the_installed_package() -> None:
    try:
        installed = version("penstock")
    except PackageNotFoundError:
        pytest.skip("penstock runs from its source folder; it is not installed")
    assert installed == penstock.__version__


def test_the_command_line_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == penstock.__version__
