"""Starts or joins Ray, and checks that the instances fit on what it has."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray

from penstock.config import ConfigError
from penstock.settings import ClusterConfig

# About the least that Ray takes: only hand-offs go through its object store.
_STORE_BYTES = 100 << 20
_HAND_OFF_BYTES = 1 << 30
_PATIENCE = 5.0


class RayUnavailableError(RuntimeError):
    """Ray cannot be reached, or started."""


class Room(NamedTuple):
    """What each instance gets.

    Attributes:
        cpus: that Ray reserves.
        threads: for its engine, unless configured.
        memory_share: of the memory that is free where it runs.
    """

    cpus: float
    threads: int
    memory_share: float


def connect(cluster: ClusterConfig) -> Room:
    """Join the cluster, or start Ray on this machine; before signal handlers, which Ray sets.

    Raises:
        ConfigError: it cannot be reached, or the instances do not fit; names the flag.
    """
    address = cluster.ray_address
    try:
        join(address, _HAND_OFF_BYTES if cluster.prefill else _STORE_BYTES)
    except RayUnavailableError as error:
        where = "" if address is None else f"--ray-address {address}: "
        msg = f"{where}{error}"
        raise ConfigError(msg) from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    try:
        return room_for(cluster, machines)
    except ConfigError:
        ray.shutdown()
        raise


def join(address: str | None, store_bytes: int = _STORE_BYTES) -> None:
    """Join the cluster at an address, or start Ray on this machine.

    Args:
        store_bytes: of the object store, where Ray is started.

    Raises:
        RayUnavailableError: it cannot be reached, or started; says why.
    """
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=store_bytes,
                logging_level=logging.WARNING,
            )
        else:
            _reach(address)
            ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        what = "Ray cannot be started: " if address is None else ""
        msg = what + str(error).strip().splitlines()[0]
        raise RayUnavailableError(msg) from None


def _reach(address: str) -> None:
    """Fail at once where nobody listens; Ray would try for most of a minute."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "//" not in address:
        socket.create_connection((host, int(port)), _PATIENCE).close()


def room_for(cluster: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> Room:
    """What each instance gets of these machines.

    Args:
        machines: Ray's resources of each: ``CPU`` and ``GPU``.

    Raises:
        ConfigError: not all instances fit; names the flag.
    """
    given = cluster.cpus_per_instance
    cpus, gpus = 1.0 if given is None else given, cluster.gpus_per_instance
    places = [_places(machine, cpus, gpus) for machine in machines]
    if sum(places) < cluster.count:
        there = {
            name: sum(machine.get(name, 0.0) for machine in machines) for name in ("CPU", "GPU")
        }
        needs = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        msg = (
            f"{cluster.asked}: each needs {needs} of one machine, so only"
            f" {sum(places)} fit on {len(machines)} with {there['CPU']:g} CPUs and"
            f" {there['GPU']:g} GPUs; lower {cluster.flags}, --cpus-per-instance or"
            " --gpus-per-instance"
        )
        raise ConfigError(msg)
    cores = sum(machine.get("CPU", 0.0) for machine in machines)
    threads = cores / cluster.count if given is None else given
    # How many will share a machine is Ray's to say: at worst as many as fit there.  A whole GPU is
    # not shared.
    beside = min(cluster.count, max(places))
    share = min(1.0, gpus) if gpus else 1 / beside
    return Room(cpus, max(1, int(threads)), share)


def _places(machine: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Instances that fit on a machine; Ray counts in ten-thousandths."""
    fits = int(machine.get("CPU", 0.0) / cpus + 1e-4)
    return min(fits, int(machine.get("GPU", 0.0) / gpus + 1e-4)) if gpus else fits
