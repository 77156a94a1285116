"""A model is a folder, the embedded one, or a hub name; nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.models import DEMO, ModelNotFoundError, demo_path, model_path

COMMIT = "0" * 40


def test_folder_and_embedded_model(tmp_path: Path) -> None:
    assert model_path(DEMO) == demo_path()
    assert model_path(tmp_path) == tmp_path
    assert model_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["a/b/c", "../nowhere", "a b"])
def test_what_cannot_be_a_name_is_refused_without_a_network(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"model '{name}' is no folder, and no name"):
        model_path(name)


def test_an_unknown_name_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="'nobody/nothing' is no folder, and the hub"):
        model_path("nobody/nothing")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cached ``org/small`` without files; what is fetched would be in the folder ``fetched``."""
    import huggingface_hub
    from huggingface_hub import constants

    folder = tmp_path / "models--org--small"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    look_up = huggingface_hub.snapshot_download

    def download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        return look_up(name, local_files_only=True, **options) if local_files_only else "fetched"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_a_cached_name_is_found_without_the_hub(repository: Path) -> None:
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    assert model_path("org/small") == snapshot


def test_files_that_nobody_fetches_are_not_missed(repository: Path) -> None:
    snapshot = repository / "snapshots" / COMMIT
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in names:
        (snapshot / name).touch()
    listed = {name: {"size": 0, "blob_id": "0"} for name in (*names, "README.md", "model.bin")}
    (repository / "trees").mkdir()
    tree = json.dumps({"format_version": 1, "files": listed})
    (repository / "trees" / f"{COMMIT}.json").write_text(tree)
    assert model_path("org/small") == snapshot


@pytest.mark.parametrize("weights", [[], ["model-00001-of-00002.safetensors"]])
def test_what_was_not_fetched_to_the_end_is_fetched(repository: Path, weights: list[str]) -> None:
    for name in ("config.json", *weights):
        (repository / "snapshots" / COMMIT / name).touch()
    assert model_path("org/small") == Path("fetched")
