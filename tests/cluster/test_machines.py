"""How many instances fit, and what is refused before anything is loaded."""

from __future__ import annotations

import pytest

from penstock.config import ConfigError, load
from penstock.server import backend
from penstock.settings import ClusterConfig

pytest.importorskip("ray")

from penstock.cluster.machines import connect, room_for

TWO_CORES = [{"CPU": 2.0}]
GPU_NODES = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("given", "machines", "expected"),
    [
        ({"instances": 2}, TWO_CORES, (1.0, 1, 0.5)),
        ({"instances": 4, "cpus_per_instance": 0.5}, TWO_CORES, (0.5, 1, 0.25)),
        ({"instances": 2}, [{"CPU": 16.0}], (1.0, 8, 0.5)),
        ({"instances": 2, "cpus_per_instance": 4}, [{"CPU": 16.0}], (4, 4, 0.5)),
        ({"instances": 3, "gpus_per_instance": 1}, GPU_NODES, (1.0, 10, 1.0)),
        ({"instances": 4, "gpus_per_instance": 0.5}, GPU_NODES, (1.0, 8, 0.5)),
        ({"instances": 10, "cpus_per_instance": 0.1}, [{"CPU": 1.0}], (0.1, 1, 0.1)),
    ],
)
def test_what_each_gets(
    given: dict[str, float], machines: list[dict[str, float]], expected: tuple[float, int, float]
) -> None:
    assert room_for(ClusterConfig(**given), machines) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "machines", "only"),
    [
        ({"instances": 4, "cpus_per_instance": 2}, TWO_CORES, 1),
        ({"instances": 2, "cpus_per_instance": 2}, [{"CPU": 3.0}, {"CPU": 1.0}], 1),
        ({"instances": 4, "gpus_per_instance": 1}, GPU_NODES, 3),
        ({"instances": 2, "gpus_per_instance": 1}, TWO_CORES, 0),
    ],
)
def test_what_does_not_fit(
    given: dict[str, float], machines: list[dict[str, float]], only: int
) -> None:
    with pytest.raises(ConfigError, match=rf"--instances .* only {only} fit") as error:
        room_for(ClusterConfig(**given), machines)
    assert "--cpus-per-instance" in str(error.value)


def test_nobody_at_the_address() -> None:
    with pytest.raises(ConfigError, match=r"--ray-address 127\.0\.0\.1:9: .*refused"):
        connect(ClusterConfig(instances=2, ray_address="127.0.0.1:9"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"instances": 2, "place": "nowhere"}, "--place nowhere: .*round-robin"),
        ({"instances": 2, "place": "max-min"}, "--place max-min: .*needs a preset with slices"),
        ({"place": "round-robin"}, "--place round-robin: only --instances of 2 or more"),
        ({"gpus_per_instance": 1}, "--gpus-per-instance 1.0: only --instances of 2 or more"),
        ({"preset": "scls-x"}, "--preset scls-x: preset 'scls-x' is unknown"),
        ({"preset": "scls", "parameters": {"window": 3}}, "has no parameter 'window'"),
        (
            {"preset": "scls", "parameters": {"slice_tokens": 500}, "kv_tokens": 400},
            "--parameters.slice_tokens 500: it must be at most --kv-tokens, 400",
        ),
        ({"preset": "scls", "max_request_tokens": 100}, "at most --max-request-tokens, 100"),
        ({"instances": 2, "device": "cuda"}, "--device cuda: .*--gpus-per-instance"),
        (
            {"instances": 2, "device": "cuda:1", "gpus_per_instance": 1},
            "--device cuda:1: an instance sees only its own GPU",
        ),
    ],
)
def test_refused_before_anything_is_loaded(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        backend.check(load(flags=flags))


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"--instances 2 needs Ray: pip install 'penstock\[ray\]'"
    ):
        backend.check(load(flags={"instances": 2}))


def test_taken() -> None:
    for flags in ({"instances": 3}, {"preset": "scls"}, {"preset": "scls-pad", "instances": 2}):
        backend.check(load(flags=flags))
