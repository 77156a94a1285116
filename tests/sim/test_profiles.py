"""Profiles that ship with Penstock, and files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli import app
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.sim import profiles
from penstock.sim.layer_table import TableError, read_layer_table
from penstock.sim.profiles import Profile, ProfileError
from tests.sim.test_validate import write_tables

OWN = Profile(
    name="mine",
    title="a test",
    kind="affine",
    coefficients={"step": 0.01, "token": 1e-5, "work": 0.0, "request": 1e-4, "context": 1e-7},
    source="made up",
    error={},
)


@pytest.mark.parametrize("name", profiles.names())
def test_each_says_where_it_comes_from_and_how_far_it_is_off(name: str) -> None:
    profile = profiles.find(name)
    assert profile.name == name
    assert profile.title
    assert profile.source
    assert profile.note
    assert 0 < float(profile.error["held_out_mape"]) < 0.05
    assert profile.error["held_out_points"]
    model = profile.model()
    alone = model.seconds(StepLoad(1, 1000))
    assert 0.005 < alone < 0.05
    assert model.seconds(StepLoad(64, 64_000)) > alone
    assert model.seconds(StepLoad(0, 0, 2048, 2048 * 1024, 1)) > alone


def test_the_paper_s_machines_are_there() -> None:
    wanted = {"llama-2-7b/a100-80g", "llama-2-13b/a100-80g", "llama-2-70b/a100-80g-x4"}
    assert wanted <= set(profiles.names())


def test_a_derived_profile_is_near_an_independent_measurement() -> None:
    """DistServe measured OPT-13B on an A100 (Apache-2.0): 19.93 ms + 0.627 us per KV token +
    38.5 us per request for decoding, 0.102 ms per prompt token; the same sizes as Llama-2-13B."""
    model = profiles.load("llama-2-13b/a100-80g")
    decode = model.seconds(StepLoad(32, 32_000)) - 0.00113
    assert decode == pytest.approx(0.01993 + 32_000 * 0.627e-6 + 32 * 38.5e-6, rel=0.15)
    more = model.seconds(StepLoad(0, 0, 2048)) - model.seconds(StepLoad(0, 0, 1024))
    assert more / 1024 == pytest.approx(1.02e-4, rel=0.15)


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    OWN.save(path)
    assert profiles.find(str(path)) == OWN
    assert profiles.load(str(path)) == Affine(0.01, 1e-5, 0.0, 1e-4, 1e-7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a profile"),
        ('{"name": "x"}', "missing required field"),
    ],
)
def test_what_is_no_profile(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=words) as caught:
        profiles.load(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r"gpt-9/tpu.*llama-2-7b/a100-80g"):
        profiles.load("gpt-9/tpu")


@pytest.mark.parametrize(
    ("kind", "coefficients", "words"),
    [
        ("cubic", {}, "kind is 'cubic'.*affine, longest-bound, roofline"),
        ("affine", {"step": 1.0}, "affine needs step, token, work, request, context"),
        ("affine", {**OWN.coefficients, "step": -1.0}, "step is -1.0"),
    ],
)
def test_what_cannot_be_used(kind: str, coefficients: dict[str, float], words: str) -> None:
    bad = Profile(name="bad", title="", kind=kind, coefficients=coefficients, source="", error={})
    with pytest.raises(ProfileError, match=words):
        bad.model()


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["profiles"])
    assert not left.value.code
    out = capsys.readouterr().out
    for name in profiles.names():
        assert f"{name}: {profiles.find(name).title}" in out
    assert "derived, not measured" in out


def test_a_table_of_layer_times_is_a_profile_too(tmp_path: Path) -> None:
    prefix = write_tables(tmp_path)
    table = read_layer_table(prefix, 32)
    assert profiles.load(f"llmservingsim:{prefix}@32") == table
    for wrong in ("", "@", "@x", "@0"):
        with pytest.raises(ProfileError, match="PREFIX@LAYERS"):
            profiles.load(f"llmservingsim:{prefix}{wrong}")
    with pytest.raises(TableError, match=r"nowhere_dense.csv.gz: there is no such file"):
        profiles.load("llmservingsim:nowhere@32")
