"""A model is a folder, the embedded one, or a hub name; nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.models import DEMO, ModelNotFoundError, demo_path, model_path


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


def test_a_cached_name_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--org--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_path("org/small") == snapshot
