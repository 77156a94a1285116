"""A named preset on several simulated instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from penstock.core.dispatcher import Dispatcher
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies import presets
from penstock.core.policies.back_pressure import BackPressure
from penstock.core.policies.dispatch import DispatchPolicy
from penstock.core.policies.fleets import FLEETS, Fleet, build_fleet
from penstock.core.types import Capabilities, Role
from penstock.sim.cluster import run_cluster
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.link import Link
from penstock.sim.run import Source
from penstock.sim.slicing import cost_of, price


class Disaggregated(NamedTuple):
    """Instances with roles.

    Attributes:
        prefill, decode: how many for prompts, and for all that follows.
        link: into a decode instance; None: KV takes no time.
        back_pressure: see :class:`~penstock.core.policies.back_pressure.BackPressure`'s factor;
            None: prompts never wait.
        stream: KV crosses chunk by chunk, while the prefill goes on.
    """

    prefill: int
    decode: int
    link: Link | None = None
    back_pressure: float | None = None
    stream: bool = False

    @property
    def roles(self) -> list[Role]:
        """Of each instance."""
        return [Role.PREFILL] * self.prefill + [Role.DECODE] * self.decode

    def held_back(self, dispatch: DispatchPolicy, seed: int) -> DispatchPolicy:
        """A policy with the back-pressure that is asked for."""
        if self.back_pressure is None:
            return dispatch
        # Its draws are not those of the placement, nor of an instance.
        held = BackPressure(np.random.default_rng((seed, 1)), self.back_pressure)
        return replace(dispatch, back_pressure=held)


def simulate_fleet(  # noqa: PLR0913 - each is a setting of its own
    preset: str,
    source: Source,
    capabilities: Capabilities,
    instances: int | Disaggregated,
    latency: LatencyModel,
    *,
    place: str | None = None,
    seed: int = 0,
    parameters: Mapping[str, float | None],
    padded: bool = False,
    cap: int,
    bus: Link | None = None,
    plan_every: int | None = None,
) -> ClusterRun:
    """Simulate a preset until the source has no more jobs and all have ended.

    Args:
        capabilities: of each instance.
        instances: how many, or how many for what.
        place: instead of the preset's; None for an instance preset: in turn.
        cap: what policies are told of output lengths.
        padded: instances run static batches as rectangles, the prompts of one in one step.
        bus: of each to its host memory, if it keeps KV of evicted requests there.
        plan_every: steps from one admission pass of an instance to the next; None: the preset's.

    Raises:
        ValueError: an unknown name, or a value out of range; it names the parameter.
    """
    fleet = fleet_of(preset, place, seed, parameters)
    if fleet.dispatch.priced_tokens > cap:
        msg = f"slice_tokens is {fleet.dispatch.priced_tokens}; it must be at most the cap of {cap}"
        raise ValueError(msg)
    apart, count = (None, instances) if isinstance(instances, int) else (instances, 0)
    dispatch = apart.held_back(fleet.dispatch, seed) if apart else fleet.dispatch
    dispatcher = _dispatcher(dispatch, latency, capabilities)
    # Each instance draws for itself.
    options: dict[str, Any] = dict(fleet.parameters, profile=latency, period=plan_every)
    return run_cluster(
        source,
        _all_prompts_at_once(capabilities) if padded else capabilities,
        apart.roles if apart else [Role.MIXED] * count,
        lambda i: presets.build(fleet.preset, seed=(seed << 16) + i, **options),
        latency,
        dispatcher,
        padded=padded,
        link=apart.link if apart else None,
        stream=apart is not None and apart.stream,
        bus=bus,
    )


def fleet_of(
    preset: str, place: str | None, seed: int, parameters: Mapping[str, float | None]
) -> Fleet:
    """What to run; an instance preset is placed in turn unless a place is given.

    Raises:
        ValueError: an unknown name, or a value out of range; it names the parameter.
    """
    chosen = place or (None if preset in FLEETS else "round-robin")
    return build_fleet(preset, place=chosen, seed=seed, parameters=parameters)


def _all_prompts_at_once(machine: Capabilities) -> Capabilities:
    return replace(machine, max_step_tokens=machine.max_batch * machine.max_request_tokens)


def _dispatcher(policy: DispatchPolicy, latency: LatencyModel, machine: Capabilities) -> Dispatcher:
    """With prices, if it needs them."""
    if not policy.needs_cost:
        return Dispatcher(policy)
    tokens, safety = policy.priced_tokens, policy.safety
    model = price(latency).model
    cost = cost_of(
        model, slice_tokens=tokens, safety=safety, most=machine.max_batch,
        block_size=machine.block_size,
    )  # fmt: skip
    return Dispatcher(policy, cost)
