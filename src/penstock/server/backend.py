"""What stands behind the HTTP edge: one engine process, or a front of several instances.

The only place of the server that knows of :mod:`penstock.cluster`, and only where it is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from penstock.config import ConfigError
from penstock.core.policies.fleets import FLEETS, SLICE_PARAMETERS, Fleet, build_fleet
from penstock.server.factories import EngineSpec, build_policy
from penstock.server.metrics import Metrics
from penstock.server.supervisor import Backend, Listener, Supervisor
from penstock.settings import ClusterConfig, Config
from penstock.text.tokenizer import TextTokenizer

_RAY_WITH_NIXL = (2, 60)


def has_front(config: Config) -> bool:
    """Whether requests go through a pool before an engine."""
    return config.cluster.count > 1 or config.scheduler.preset in FLEETS


def instance_preset(config: Config) -> str:
    """The preset of each engine's scheduler."""
    return _fleet(config).preset if has_front(config) else config.scheduler.preset


def check(config: Config) -> None:
    """Whether the scheduler and the instances can be had as configured.

    Raises:
        ConfigError: naming the flag, its value and what would be right.
    """
    chosen = config.scheduler
    preset, parameters = chosen.preset, chosen.parameters
    _check_roles(config)
    if has_front(config):
        fleet = _fleet(config)
        preset, parameters = fleet.preset, _given(fleet.parameters)
    try:
        build_policy(preset, chosen.order, chosen.seed, parameters)
    except ValueError as error:
        raise ConfigError(f"--preset {chosen.preset}: {error}") from None
    if config.scheduler.preset in FLEETS:
        _check_slices(config)
    if config.cluster.count > 1:
        _check_instances(config)
        return
    for name in ClusterConfig.model_fields:
        if name in config.cluster.changed - {"instances", "prefill", "decode"}:
            flag = "--" + name.replace("_", "-")
            msg = f"{flag} {getattr(config.cluster, name)}: only --instances of 2 or more has it"
            raise ConfigError(msg)


def _check_roles(config: Config) -> None:
    cluster, preset = config.cluster, config.scheduler.preset
    for one, other in (("prefill", "decode"), ("decode", "prefill")):
        if getattr(cluster, one) and not getattr(cluster, other):
            msg = f"--{one} {getattr(cluster, one)}: it needs --{other} of 1 or more as well"
            raise ConfigError(msg)
    if not cluster.prefill:
        for name in ("kv_transport", "stream_kv"):
            if name in cluster.changed:
                flag, value = "--" + name.replace("_", "-"), getattr(cluster, name)
                msg = f"{flag} {value}: only --prefill and --decode have it"
                raise ConfigError(msg)
        return
    if cluster.kv_transport == "nixl":
        _check_nixl(config.engine.engine)
    if cluster.instances > 1:
        msg = f"--instances {cluster.instances}: give it, or {cluster.asked}, not both"
        raise ConfigError(msg)
    if preset in FLEETS:
        msg = f"--preset {preset}: slices go without roles; leave out {cluster.asked}"
        raise ConfigError(msg)


def _check_nixl(engine: str) -> None:
    if engine != "native":
        msg = f"--kv-transport nixl: it carries the tensors of --engine native, not of {engine}"
        raise ConfigError(msg)
    if importlib.util.find_spec("nixl") is None:
        msg = "--kv-transport nixl: NIXL is not installed; install it with 'penstock[nixl]'"
        raise ConfigError(msg)
    there = importlib.metadata.version("ray")
    if tuple(map(int, there.split(".")[:2])) < _RAY_WITH_NIXL:
        msg = f"--kv-transport nixl: Ray is {there}; it needs 2.60 or later ('penstock[nixl]')"
        raise ConfigError(msg)


def _fleet(config: Config) -> Fleet:
    chosen = config.scheduler
    place = config.cluster.place
    try:
        build_fleet(chosen.preset, seed=chosen.seed, parameters=chosen.parameters)
    except ValueError as error:
        raise ConfigError(f"--preset {chosen.preset}: {error}") from None
    try:
        return build_fleet(
            chosen.preset, place=place, seed=chosen.seed, parameters=chosen.parameters
        )
    except ValueError as error:
        raise ConfigError(f"--place {place}: {error}") from None


def _given(parameters: Mapping[str, float | None]) -> dict[str, int | float]:
    return {name: value for name, value in parameters.items() if value is not None}


def _check_slices(config: Config) -> None:
    given = {**SLICE_PARAMETERS, **config.scheduler.parameters}["slice_tokens"]
    for name in ("max_request_tokens", "kv_tokens"):
        limit = getattr(config.engine, name)
        if limit is not None and given > limit:
            flag = "--" + name.replace("_", "-")
            msg = f"--parameters.slice_tokens {given}: it must be at most {flag}, {limit}"
            raise ConfigError(msg)


def _check_instances(config: Config) -> None:
    engine, cluster = config.engine, config.cluster
    if importlib.util.find_spec("ray") is None:
        msg = f"{cluster.asked} needs Ray: pip install 'penstock[ray]'"
        raise ConfigError(msg)
    if engine.engine != "native" or not engine.device.startswith("cuda"):
        return
    if not cluster.gpus_per_instance:
        msg = f"--device {engine.device}: instances get their GPUs from --gpus-per-instance, which"
        raise ConfigError(f"{msg} is 0")
    if engine.device not in ("cuda", "cuda:0"):
        msg = f"--device {engine.device}: an instance sees only its own GPU, which is cuda:0"
        raise ConfigError(msg)


def build_backend(
    config: Config, path: Path, text: TextTokenizer, listener: Listener, metrics: Metrics
) -> Backend:
    """What the configuration asks for.

    Raises:
        ConfigError: the instances do not fit on the machines there are.
    """
    spec = EngineSpec.of(config, path, text)
    if not has_front(config):
        return Supervisor(spec, listener)
    from penstock.cluster.build import build_front

    return build_front(config, spec, listener, metrics)
