"""The wheel holds what an installed Penstock needs: the code, its data, and nothing by accident."""

from __future__ import annotations

import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "penstock"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build.build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as opened:
        yield opened


def test_wheel_holds_the_package_and_its_data(wheel: zipfile.ZipFile) -> None:
    junk = {".so", ".pyc"}
    expected = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in junk and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if name.startswith("penstock/")}
    assert packed == expected
    assert "penstock/py.typed" in packed
    assert any(name.endswith(".cpp") for name in packed)
    assert any(name.startswith("penstock/models/demo/") for name in packed)


def test_wheel_has_version_licence_and_command(wheel: zipfile.ZipFile) -> None:
    info = f"penstock-{penstock.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert b"penstock = penstock.cli:main" in wheel.read(f"{info}/entry_points.txt")


def test_base_install_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    heavy = ("torch", "transformers", "ray", "vllm")
    assert not [name for name in project["dependencies"] if name.startswith(heavy)]


def test_changelog_knows_the_version() -> None:
    assert f"## [{penstock.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
