"""``penstock simulate``: the production scheduler on a virtual clock, from the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from penstock import __version__
from penstock.bench.result import command_line, machine, seconds, share
from penstock.bench.workload import Workload
from penstock.core.policies.fleets import FLEETS
from penstock.core.policies.presets import PRESETS
from penstock.sim import chrome_trace as trace_writer
from penstock.sim.execute import check_spec
from penstock.sim.output import STDOUT, check_targets, write_json
from penstock.sim.simulation import Simulation, simulation_of
from penstock.sim.spec import RunSpec, SpecError, default_loop, workload_of

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class RequestOptions:
    """What is asked for, and when; the same options as those of ``penstock bench``.

    Attributes:
        trace: A trace file (Azure, BurstGPT, Mooncake, ShareGPT-o1 or plain; .gz too).
        lengths: Real lengths that come with penstock: sharegpt, sharegpt-o1
            or azure-conversation.
        input: Prompt lengths: 512, 32-4096 (uniform) or lognormal:MEDIAN,SIGMA[,MAX].
        output: Output lengths in the same notation.
        scale: Multiply all lengths by this, at most 1.
        requests: How many; by default all of a trace, else 200.
        cap: What policies are told of output lengths; by default the longest output. With a
            latency model outputs are cut there.
        clients: Closed loop: so many clients with one request each at a time.
        retries: Closed loop: how often a request that missed its SLO goes back into the queue.
        rate: Open loop: requests per second.
        arrivals: Open loop: poisson, gamma:CV, or trace for the trace's own times.
        speed: Open loop: divide the times by this.
        slo: Bounds in seconds, as ttft=2,gap=0.5,tpot=0.1,e2e=60; repeat with NAME*WEIGHT: in
            front for a mix of classes.
        seed: The same seed gives the same requests, arrivals and plans.
    """

    trace: Path | None = None
    lengths: str | None = None
    input: str | None = None
    output: str | None = None
    scale: float = 1.0
    requests: int | None = None
    cap: int | None = None
    clients: int | None = None
    retries: int = 0
    rate: float | None = None
    arrivals: str | None = None
    speed: float = 1.0
    slo: Annotated[list[str] | None, Parameter(negative="", consume_multiple=False)] = None
    seed: int = 0


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class MachineOptions:
    """What serves them.

    Attributes:
        preset: Scheduling presets, separated by commas; see 'penstock presets'.
        parameters: Overrides of the presets' parameters, as --parameters.reserve 0.05; each
            goes to the presets that have it.
        cold_start: The same as --parameters.cold_start.
        plan_every: Steps from one admission pass to the next; by default the preset's.
        kv_tokens: KV memory, in tokens.
        block_size: Tokens per KV block.
        prefix_cache: Compute blocks that the trace's requests share only once. Needs a trace
            that says which (Mooncake), and a block size that divides its blocks.
        swap_tokens: Tokens of evicted requests whose KV is kept in host memory; the others are
            computed again.
        swap_bandwidth: Of the bus to it, in GB/s.
        max_batch: Most requests in a step; by default 1024, or as many as --prefill-budget.
        prefill_budget: Most tokens in a step, at least --max-batch; prompts are cut into chunks
            that fit.
        profile: Step times: the name of a model and GPU, or a profile's file.
        instances: Machines of this kind.
        place: How requests are placed on them: round-robin, least-outstanding, power-of-two,
            forecast-aware, or max-min for presets with slices; by default in turn, or as the
            preset does it.
        prefill: Instances for prompts only, with --decode ones for all that follows.
        decode: Instances that go on from the KV that the --prefill ones computed.
        kv_bytes_per_token: What the KV of a token weighs on its way to another instance or to host
            memory.
        link_bandwidth: Of the link into a decode instance, in GB/s.
        link_latency: Of a transfer, in seconds.
        stream_kv: KV crosses after each prompt chunk instead of at the end of the prefill.
        back_pressure: Prompts wait while the forecast KV of all that they lead to is above so
            many times the decode instances' memory; by default they never do.
        padded: Static batches are rectangles: prompts padded to the longest, and every row
            computed until the last one ends.
        steps_only: No step times: a decode step is the unit and admission costs none. All
            requests wait from the start unless --clients, --rate or --arrivals is given, outputs
            are not cut at the cap, Past-Future starts with 512 as the past (--cold-start), and
            numbers are taken until nobody waits any more.
    """

    preset: str = "past-future"
    parameters: dict[str, float] | None = None
    cold_start: int | None = None
    plan_every: int | None = None
    kv_tokens: int | None = None
    block_size: int = 1
    prefix_cache: bool = False
    swap_tokens: int = 0
    swap_bandwidth: float = 25.0
    max_batch: int | None = None
    prefill_budget: int = 2048
    profile: str | None = None
    instances: int = 1
    place: str | None = None
    prefill: int = 0
    decode: int = 0
    kv_bytes_per_token: int = 131_072
    link_bandwidth: float = 50.0
    link_latency: float = 0.001
    stream_kv: bool = False
    back_pressure: float | None = None
    padded: bool = False
    steps_only: bool = False


def simulate(
    *,
    requests: RequestOptions | None = None,
    machine_options: MachineOptions | None = None,
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    html: Path | None = None,
    chrome_trace: Path | None = None,
) -> int:
    """Simulate scheduling presets on a load: the production scheduler on a virtual clock.

    The exit code is 0 if requests finished under every preset, 1 if not, 2 if options are wrong.

    Args:
        requests: What is asked for.
        machine_options: What serves them.
        json: Write all numbers to this file; - writes only JSON to standard output.
        html: Write a report with figures to this file.
        chrome_trace: Write what happened step by step to this file, for Perfetto or
            chrome://tracing; compressed if it ends in .gz.
    """
    try:
        check_targets(json=json, html=html, chrome_trace=chrome_trace)
        specs = specs_of(requests or RequestOptions(), machine_options or MachineOptions())
        workload = workload_of(specs[0])
        observe = html is not None or chrome_trace is not None
        for spec in specs[1:]:  # what the first cannot do its own run refuses at once
            check_spec(spec, workload, watched=observe)
        done = [simulation_of(spec, workload, observe=observe) for spec in specs]
        if html is not None:
            from penstock.sim import report

            report.simulations(done, html)
        if chrome_trace is not None:
            _trace(done, chrome_trace)
        _report(done, workload, json)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"penstock simulate: {error}\n")
        return 2
    return 0 if all(one.summary.finished for one in done) else 1


def specs_of(asked: RequestOptions, given: MachineOptions) -> list[RunSpec]:
    """One specification per preset.

    Raises:
        ValueError: options that do not go together, or a parameter that no preset has.
    """
    names = [name.strip() for name in given.preset.split(",")]
    overrides: dict[str, float | None] = dict(given.parameters or {})
    if given.cold_start is not None:
        overrides["cold_start"] = given.cold_start
    known = _parameters_of(names, overrides)
    if given.kv_tokens is None:
        msg = "--kv-tokens is needed: the KV memory, in tokens"
        raise SpecError(msg)
    if given.profile is None and not given.steps_only:
        msg = "give --profile (step times of a model on a GPU), or --steps-only"
        raise SpecError(msg)
    clients, arrivals = _loop(asked, steps_only=given.steps_only)
    return [
        RunSpec(
            preset=name,
            parameters={k: v for k, v in overrides.items() if k in known.get(name, ())},
            trace=None if asked.trace is None else str(asked.trace),
            lengths=asked.lengths,
            input=_lengths(asked.input),
            output=_lengths(asked.output),
            scale=asked.scale,
            requests=asked.requests,
            clients=clients,
            retries=asked.retries,
            rate=asked.rate,
            arrivals=arrivals,
            speed=asked.speed,
            slo=tuple(asked.slo or ()),
            cap=asked.cap,
            kv_tokens=given.kv_tokens,
            block_size=given.block_size,
            prefix_cache=given.prefix_cache,
            max_batch=given.max_batch,
            prefill_budget=given.prefill_budget,
            plan_every=given.plan_every,
            profile=given.profile,
            steps_only=given.steps_only,
            place=given.place,
            padded=given.padded,
            seed=asked.seed,
            **_instances(given),
        )
        for name in names
    ]


def _instances(given: MachineOptions) -> dict[str, Any]:
    """How many, for what, and what is between them and behind each."""
    return {
        "swap_tokens": given.swap_tokens,
        "swap_bandwidth": given.swap_bandwidth * 1e9,
        "instances": given.instances,
        "prefill": given.prefill,
        "decode": given.decode,
        "kv_bytes_per_token": given.kv_bytes_per_token,
        "link_bandwidth": given.link_bandwidth * 1e9,
        "link_latency": given.link_latency,
        "stream_kv": given.stream_kv,
        "back_pressure": given.back_pressure,
    }


def _parameters_of(
    names: Sequence[str], overrides: Mapping[str, float | None]
) -> dict[str, Mapping[str, object]]:
    """The parameters of each preset; each override is one of somebody's."""
    known: dict[str, Mapping[str, object]] = {
        name: FLEETS[name].parameters if name in FLEETS else PRESETS[name].parameters
        for name in names
        if name in FLEETS or name in PRESETS
    }
    for parameter in overrides:
        if not any(parameter in parameters for parameters in known.values()):
            msg = f"--parameters.{parameter}: none of the presets {','.join(names)} has it"
            raise SpecError(msg)
    return known


def _loop(asked: RequestOptions, *, steps_only: bool) -> tuple[int | None, str | None]:
    """Clients and arrivals, with defaults where neither loop was asked for."""
    if asked.clients is not None or asked.rate is not None or asked.arrivals is not None:
        return asked.clients, asked.arrivals
    return default_loop(asked.requests, traced=asked.trace is not None, steps_only=steps_only)


def _lengths(text: str | None) -> str | None:
    """``32-4096`` is short for ``uniform:32-4096``."""
    if text is not None and re.fullmatch(r"\d+-\d+", text):
        return f"uniform:{text}"
    return text


def _report(done: Sequence[Simulation], workload: Workload, json: str | None) -> None:
    if json is not None:
        data = {
            "schema": SCHEMA,
            "penstock": __version__,
            "command": command_line(),
            "source": workload.source,
            "settings": {k: v for k, v in msgspec.to_builtins(done[0].spec).items() if v},
            "notes": list(done[0].summary.notes),
            "machine": machine(),
            "runs": [one.to_dict() for one in done],
        }
        write_json(data, json)
        if json == STDOUT:
            return
    from rich.console import Console

    console = Console()
    console.print(_table(done, workload))
    for note in done[0].summary.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _trace(done: Sequence[Simulation], path: Path) -> None:
    runs = [
        (f"{one.spec.policy_name} {number}", run, observation)
        for one in done
        for number, (run, observation) in enumerate(zip(one.runs, one.observations, strict=True), 1)
    ]
    about = {"command": command_line(), "source": done[0].workload.source}
    trace_writer.write(path, runs, about)


def _table(done: Sequence[Simulation], workload: Workload) -> Table:
    from rich.table import Table

    view = Table(title=f"{workload.source}, {len(workload)} requests", title_justify="left")
    rows = [_study_row(one) if one.behaviour else _timed_row(one) for one in done]
    for i, head in enumerate(rows[0]):
        view.add_column(head, justify="left" if i == 0 else "right")
    for row in rows:
        view.add_row(*row.values())
    return view


def _study_row(one: Simulation) -> dict[str, str]:
    study, summary = one.behaviour, one.summary
    assert study is not None
    return {
        "preset": one.spec.policy_name,
        "decode steps": f"{study.decode_steps:,}",
        "KV used": share(study.memory),
        "true peak": share(study.peak),
        "evicted": share(summary.evicted_ratio),
        "finished": str(summary.finished),
        "took": seconds(summary.wall_s),
    }


def _timed_row(one: Simulation) -> dict[str, str]:
    summary = one.summary

    def p99(name: str) -> str:
        return seconds(summary.latency[name]["p99"]) if name in summary.latency else "-"

    return {
        "preset": one.spec.policy_name,
        "goodput tok/s": f"{summary.goodput_output_tps:.0f}",
        "attainment": share(summary.attainment),
        "throughput tok/s": f"{summary.throughput_output_tps:.0f}",
        **{f"p99 {name}": p99(name) for name in ("ttft", "tpot", "gap")},
        "evicted": share(summary.evicted_ratio),
        "KV used": share(summary.memory),
        "finished": str(summary.finished),
        "took": seconds(summary.wall_s),
    }
