"""``penstock.simulate``: one simulated run as an object for programs and notebooks."""

from __future__ import annotations

import html
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.bench.goodput import BOUNDS
from penstock.bench.result import seconds, share
from penstock.bench.workload import Workload, parse_slo
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.execute import cluster_of, simulate_spec
from penstock.sim.observe import Observation, observed
from penstock.sim.outcome import attempt_of
from penstock.sim.result import RunResult, result_of
from penstock.sim.run import Run
from penstock.sim.spec import RunSpec, SpecError, checked_workload, default_loop, workload_of
from penstock.sim.study import Behaviour, behaviour_of

if TYPE_CHECKING:
    import polars as pl


_OF_THE_WORKLOAD = frozenset(
    {"trace", "lengths", "input", "output", "scale", "requests", "rate", "arrivals"}
)


@dataclass(frozen=True, slots=True, repr=False)
class Simulation:
    """What came of a simulated run.

    Attributes:
        spec: what was simulated.
        workload: its requests.
        runs: one per instance, with a record per attempt.
        summary: the numbers, by the definitions of ``docs/bench.md``.
        behaviour: the behaviour study's numbers; None with a latency model.
        observations: one per run, if they were asked for: what happened step by step.
        cluster: what came of instances behind a dispatcher, if there is one.
    """

    spec: RunSpec
    workload: Workload
    runs: tuple[Run, ...]
    summary: RunResult
    behaviour: Behaviour | None
    observations: tuple[Observation, ...] = ()
    cluster: ClusterRun | None = None

    def table(self) -> pl.DataFrame:
        """The attempts in the order in which they ended, one row each; times in seconds."""
        import polars as pl

        records = [record for run in self.runs for record in run.records]
        attempts = [attempt_of(record) for record in records]
        columns: dict[str, list[Any]] = {
            "request": [a.request for a in attempts],
            "try": [a.number for a in attempts],
            "slo_class": [a.slo_class for a in attempts],
            "prompt_tokens": [a.prompt_tokens for a in attempts],
            "output_tokens": [a.output_tokens for a in attempts],
            "arrival_s": [a.sent for a in attempts],
            "ended_s": [a.ended for a in attempts],
            "end": [a.end.value for a in attempts],
            "met": [a.met for a in attempts],
            "evictions": [r.ended.evictions for r in records],
        }
        for name in BOUNDS:
            columns[f"{name}_s"] = [getattr(a.latency, name) for a in attempts]
        return pl.DataFrame(columns).sort("ended_s", maintain_order=True)

    def to_dict(self) -> dict[str, object]:
        """As plain data: the keys that ``penstock simulate --json`` documents."""
        spec, summary, study = self.spec, self.summary, self.behaviour
        data: dict[str, object] = {
            "preset": spec.preset,
            "parameters": dict(spec.parameters),
            "seed": spec.seed,
            "decode_steps": summary.decode_steps if study is None else study.decode_steps,
            "memory_utilization": summary.memory if study is None else study.memory,
            "peak_memory": None if study is None else study.peak,
            "evicted_ratio": summary.evicted_ratio,
            "evictions": summary.evictions,
            "prefix_hits": summary.prefix_hits,
            "swapped_tokens": summary.swapped_tokens,
            "finished": summary.finished,
            "attempts": summary.attempts,
            "ends": summary.ends,
            "all_decode_steps": summary.decode_steps,
            "wall_s": summary.wall_s,
        }
        if study is None:
            data |= {
                "seconds": summary.seconds,
                "attainment": summary.attainment,
                "goodput_output_tps": summary.goodput_output_tps,
                "goodput_total_tps": summary.goodput_total_tps,
                "goodput_rps": summary.goodput_rps,
                "throughput_output_tps": summary.throughput_output_tps,
                "latency": summary.latency,
                "classes": summary.classes,
            }
        if self.cluster is not None:
            data["cluster"] = self.cluster.summary()
        return data

    def lines(self) -> list[tuple[str, str]]:
        """The numbers that matter, named, for people."""
        summary, study = self.summary, self.behaviour
        lines = [("preset", self.spec.policy_name), ("finished", f"{summary.finished}")]
        if study is not None:
            lines += [
                ("decode steps", f"{study.decode_steps:,}"),
                ("KV memory used (mean)", share(study.memory)),
                ("true future peak (mean)", share(study.peak)),
            ]
        else:
            lines += [
                ("goodput (output)", f"{summary.goodput_output_tps:.1f} tok/s"),
                ("attainment", share(summary.attainment)),
                ("throughput (output)", f"{summary.throughput_output_tps:.1f} tok/s"),
            ]
            for name, row in summary.latency.items():
                cells = " / ".join(seconds(row[p]) for p in ("p50", "p90", "p99"))
                lines.append((f"{name} p50 / p90 / p99", cells))
            lines.append(("KV memory used (mean)", share(summary.memory)))
            lines.append(("simulated", f"{summary.seconds:.1f} s"))
        lines.append(("evictions per request", share(summary.evicted_ratio)))
        lines.append(("took", f"{summary.wall_s:.2f} s"))
        return lines

    def __repr__(self) -> str:
        width = max(len(name) for name, _ in self.lines())
        rows = (f"  {name:<{width}}  {value}" for name, value in self.lines())
        return "\n".join((f"Simulation of {self.workload.source}", *rows))

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:right'>{html.escape(value)}</td></tr>"
            for name, value in self.lines()
        )
        return f"<table><caption>{html.escape(self.workload.source)}</caption>{cells}</table>"


def simulate(
    preset: str = "past-future",
    *,
    kv_tokens: int,
    workload: Workload | None = None,
    **settings: Any,
) -> Simulation:
    """Simulate one scheduler on one load.

    Args:
        preset: one of ``penstock presets``.
        kv_tokens: KV memory, in tokens.
        workload: the requests, as :mod:`penstock.bench.workload` makes them; by default what
            the settings say.  With ``slo`` among those it gets these classes.
        settings: further fields of :class:`penstock.sim.spec.RunSpec`, such as ``profile``,
            ``clients``, ``rate``, ``trace``, ``slo``, ``parameters`` or ``seed``.  Where none says
            how requests come, a trace's own times count, and in steps only all wait at the start.

    Raises:
        ValueError: what cannot be simulated, and why.
        TypeError: a setting that there is not.
        OSError: the trace cannot be read.
    """
    if isinstance(settings.get("slo"), str):
        settings["slo"] = (settings["slo"],)
    spec = RunSpec(preset=preset, kv_tokens=kv_tokens, **settings)
    if workload is None:
        if spec.clients is None and spec.rate is None and spec.arrivals is None:
            clients, arrivals = default_loop(
                spec.requests, traced=spec.trace is not None, steps_only=spec.steps_only
            )
            spec = msgspec.structs.replace(spec, clients=clients, arrivals=arrivals)
        return simulation_of(spec, workload_of(spec))
    for name in _OF_THE_WORKLOAD & settings.keys():
        msg = f"{name} is {settings[name]!r}; a workload that is given has its own"
        raise SpecError(msg)
    if spec.slo:
        workload = workload.with_classes(parse_slo(spec.slo), spec.seed)
    return simulation_of(spec, checked_workload(spec, workload))


def simulation_of(spec: RunSpec, workload: Workload, *, observe: bool = False) -> Simulation:
    """Simulate a specification over its requests.

    Args:
        observe: also write down what happens step by step, which takes longer.

    Raises:
        ValueError: it cannot be simulated.
    """
    began = time.perf_counter()
    seen: list[Observation] = []
    cluster = None
    if spec.pooled and not observe:
        cluster = cluster_of(spec, workload)
        runs = cluster.runs()
    elif observe:
        runs, seen = observed(spec, workload)
    else:
        runs = simulate_spec(spec, workload)
    wall = time.perf_counter() - began
    study = behaviour_of(runs, spec.kv_tokens) if spec.steps_only else None
    summary = result_of(runs, workload, wall)
    return Simulation(spec, workload, tuple(runs), summary, study, tuple(seen), cluster)
