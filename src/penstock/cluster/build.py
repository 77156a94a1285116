"""From a configuration to a front and the instances behind it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from penstock.cluster.front import Front
from penstock.cluster.parcels import Parcel
from penstock.cluster.stories import InstanceObserver
from penstock.core.policies.back_pressure import BackPressure
from penstock.core.policies.fleets import build_fleet
from penstock.server.factories import EngineSpec
from penstock.server.messages import Command, Event, Ready
from penstock.server.supervisor import Backend, Listener, Supervisor
from penstock.settings import Config

# Of the memory that instances take unasked, where copies of KV lie on the device too.
_BESIDE_COPIES = 0.9


class OneProcess:
    """One engine process as the only instance: slices without Ray.

    Args:
        spec: of the process.
        front: who is told.
    """

    def __init__(self, spec: EngineSpec, front: Front) -> None:
        self._front = front
        self._supervisor = Supervisor(spec, self)

    def send(self, number: int, command: Command, parcels: Sequence[Parcel] = ()) -> None:
        """Hand a command to the process; alone it has nobody to get KV from."""
        del number, parcels
        self._supervisor.send(command)

    def send_ahead(self, number: int, parcel: Parcel) -> None:
        """See :meth:`send`."""
        del number, parcel

    async def run(self) -> None:
        """Keep it alive until cancelled.

        Raises:
            EngineStartError: it could not start.
        """
        await self._supervisor.run()

    def on_ready(self, ready: Ready) -> None:
        """A process is loaded and takes requests."""
        self._front.instance_ready(0, ready)

    def on_event(self, event: Event) -> None:
        """The process said something."""
        self._front.instance_said(0, event)

    def on_death(self, status: int) -> None:
        """The process ended without being asked to."""
        del status
        self._front.instance_lost(0)


def build_front(
    config: Config, spec: EngineSpec, listener: Listener, observer: InstanceObserver
) -> Backend:
    """A front of as many instances as configured; with more than one, Ray is started or joined.

    Args:
        spec: of each instance, but for what several of them change.

    Raises:
        ConfigError: the instances do not fit, or Ray cannot be reached; names the flag.
        ValueError: the preset or the placement cannot be had.
    """
    chosen, cluster = config.scheduler, config.cluster
    fleet = build_fleet(
        chosen.preset, place=cluster.place, seed=chosen.seed, parameters=chosen.parameters
    )
    spec = msgspec.structs.replace(
        spec,
        preset=fleet.preset,
        parameters={k: v for k, v in fleet.parameters.items() if v is not None},
        prices=fleet.dispatch.needs_cost,
    )
    dispatch = fleet.dispatch
    if cluster.prefill and chosen.preset == "kairos":
        dispatch = replace(dispatch, back_pressure=BackPressure(np.random.default_rng(chosen.seed)))
    front = Front(dispatch, listener, observer, cluster.roles, stream_kv=cluster.stream_kv)
    if cluster.count == 1:
        front.attach(OneProcess(spec, front))
        return front
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    from penstock.cluster.fleet import RayFleet
    from penstock.cluster.machines import connect

    room = connect(cluster)
    options = dict(spec.options)
    if spec.kind == "native":
        options.setdefault("threads", room.threads)
        options["memory_share"] = room.memory_share
    transport = cluster.kv_transport if cluster.prefill else ""
    if transport == "nixl":
        options["kv_on_device"] = True
        options["memory_share"] = room.memory_share * _BESIDE_COPIES
    spec = msgspec.structs.replace(spec, options=options, kv_transport=transport)
    cpus, gpus = room.cpus, cluster.gpus_per_instance
    front.attach(RayFleet(spec, cluster.count, cpus, gpus, front))
    return front
