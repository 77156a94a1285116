"""Simulates what a specification says."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.bench.workload import Workload
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies.base import Policy
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.fleet import simulate_fleet
from penstock.sim.result import RunResult, result_of
from penstock.sim.run import Job, Run, Source, Watch, run
from penstock.sim.sources import ClosedLoop, OpenLoop
from penstock.sim.spec import (
    RunSpec,
    SpecError,
    cap_of,
    capabilities_of,
    jobs_of,
    latency_model,
    policy_of,
    workload_of,
)
from penstock.sim.study import count_bounces, with_jobs


def one_run(spec: RunSpec) -> RunResult:
    """Simulate a specification.

    Raises:
        ValueError: it cannot be simulated; names what and why.
        OSError: its trace cannot be read.
    """
    began = time.perf_counter()
    workload = workload_of(spec)
    runs = simulate_spec(spec, workload)
    return result_of(runs, workload, time.perf_counter() - began)


def check_spec(spec: RunSpec, workload: Workload, *, watched: bool = False) -> None:
    """Build all that a specification asks for, and simulate nothing.

    Args:
        workload: of the specification.
        watched: whether each step will be looked at.

    Raises:
        ValueError: it cannot be simulated; names what and why.
    """
    if not spec.pooled:
        _alone(spec, policy_of(spec), OpenLoop([]), latency_model(spec))
        return
    if watched:
        raise _unwatchable(spec)
    _cluster(spec, OpenLoop([]), cap_of(spec, workload))


def cluster_of(spec: RunSpec, workload: Workload) -> ClusterRun:
    """Simulate instances behind a dispatcher.

    Raises:
        ValueError: it cannot be simulated; names what and why.
    """
    return _cluster(spec, _source(spec, jobs_of(spec, workload)), cap_of(spec, workload))


def simulate_spec(
    spec: RunSpec,
    workload: Workload,
    *,
    policy: Policy | None = None,
    watch: Watch | None = None,
) -> list[Run]:
    """Simulate each instance.

    Args:
        workload: of the specification.
        policy: instead of the specification's, for observers that wrap it; one instance only.
        watch: see :func:`penstock.sim.run.run`.
    """
    if spec.pooled:
        if policy is not None or watch is not None:
            raise _unwatchable(spec)
        return cluster_of(spec, workload).runs()
    latency = latency_model(spec)
    jobs = jobs_of(spec, workload)
    runs = []
    for first in range(min(spec.instances, len(jobs))):
        mine = jobs[first :: spec.instances]
        chosen = with_jobs(policy or policy_of(spec, first), mine)
        done = _alone(spec, chosen, _source(spec, mine), latency, watch)
        runs.append(count_bounces(done, chosen))
    return runs


def _alone(
    spec: RunSpec,
    policy: Policy,
    source: Source,
    latency: LatencyModel,
    watch: Watch | None = None,
) -> Run:
    """One instance, without a dispatcher."""
    machine, enforce_caps = capabilities_of(spec), not spec.steps_only
    return run(
        source, machine, policy, latency, enforce_caps=enforce_caps, watch=watch, bus=spec.bus
    )


def _cluster(spec: RunSpec, source: Source, cap: int) -> ClusterRun:
    return simulate_fleet(
        spec.preset,
        source,
        capabilities_of(spec),
        spec.machines,
        latency_model(spec),
        place=spec.place,
        seed=spec.seed,
        parameters=spec.parameters,
        padded=spec.padded,
        cap=cap,
        bus=spec.bus,
        plan_every=spec.plan_every,
    )


def _unwatchable(spec: RunSpec) -> SpecError:
    msg = f"preset {spec.preset} with place {spec.place} cannot be watched step by step; "
    return SpecError(msg + "leave the report and the trace out")


def _source(spec: RunSpec, jobs: Sequence[Job]) -> Source:
    if spec.clients is None:
        return OpenLoop(jobs)
    return ClosedLoop(jobs, spec.clients, retries=spec.retries)
