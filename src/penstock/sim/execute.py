"""Simulates what a specification says."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.bench.workload import Workload
from penstock.core.policies.base import Policy
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.fleet import simulate_fleet
from penstock.sim.result import RunResult, result_of
from penstock.sim.run import Job, Run, Source, Watch, run
from penstock.sim.sources import ClosedLoop, OpenLoop
from penstock.sim.spec import (
    RunSpec,
    SpecError,
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


def cluster_of(spec: RunSpec, workload: Workload) -> ClusterRun:
    """Simulate instances behind a dispatcher.

    Raises:
        ValueError: it cannot be simulated; names what and why.
    """
    jobs = jobs_of(spec, workload)
    return simulate_fleet(
        spec.preset,
        _source(spec, jobs),
        capabilities_of(spec),
        spec.machines,
        latency_model(spec),
        place=spec.place,
        seed=spec.seed,
        parameters=spec.parameters,
        padded=spec.padded,
        cap=jobs[0].cap,
        bus=spec.bus,
        plan_every=spec.plan_every,
    )


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
            msg = f"preset {spec.preset} with place {spec.place} cannot be watched step by step; "
            msg += "leave the report and the trace out"
            raise SpecError(msg)
        return cluster_of(spec, workload).runs()
    latency = latency_model(spec)
    machine = capabilities_of(spec)
    jobs = jobs_of(spec, workload)
    runs = []
    for first in range(min(spec.instances, len(jobs))):
        mine = jobs[first :: spec.instances]
        chosen = with_jobs(policy or policy_of(spec, first), mine)
        source = _source(spec, mine)
        done = run(
            source, machine, chosen, latency, enforce_caps=not spec.steps_only, watch=watch,
            bus=spec.bus,
        )  # fmt: skip
        runs.append(count_bounces(done, chosen))
    return runs


def _source(spec: RunSpec, jobs: Sequence[Job]) -> Source:
    if spec.clients is None:
        return OpenLoop(jobs)
    return ClosedLoop(jobs, spec.clients, retries=spec.retries)
