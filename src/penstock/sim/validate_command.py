"""``penstock validate``: the simulator against a measured run of vLLM."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter

from penstock import __version__
from penstock.bench.result import command_line, machine
from penstock.sim import profiles
from penstock.sim.layer_counts import depths, layers_of
from penstock.sim.layer_table import read_layer_table
from penstock.sim.measured import MeasuredRequest, places_seen, read_meta, read_requests
from penstock.sim.output import STDOUT, check_targets, write_json
from penstock.sim.validate import Hosted, Server, Validation, validate

SCHEMA = 1
_ASYNC_SINCE = (0, 14)
_BLOCK, _MAX_BATCH, _STEP_TOKENS = 16, 256, 2048  # vLLM's own defaults


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class ServerOptions:
    """The server that was measured; what is left out is read from ``..._meta.json`` beside the run.

    Attributes:
        kv_tokens: KV memory, in tokens.
        block_size: Tokens per KV block (16 if nobody says).
        max_batch: Most requests in a step (vLLM's --max-num-seqs; if nobody says, what the run
            shows, else 256).
        prefill_budget: Most tokens in a step (--max-num-batched-tokens; 2048 if nobody says).
        parallel: GPUs that share each layer (--tensor-parallel-size; 1 if nobody says).
        depth: 2 if a step is planned while the one before it runs (--async-scheduling, vLLM's
            default since 0.14), else 1.
        prefix_cache: Whether prefixes are cached (--enable-prefix-caching, vLLM's default); what is
            left of an evicted request's prompt is then not computed anew.
        layers: The model's decoder layers. Known for many models by their name; else the depth that
            explains the calibrated requests best is taken.
    """

    kv_tokens: int
    block_size: int | None = None
    max_batch: int | None = None
    prefill_budget: int | None = None
    parallel: int | None = None
    depth: Literal[1, 2] | None = None
    prefix_cache: Annotated[bool | None, Parameter(negative="--no-prefix-cache")] = None
    layers: int | None = None


def validate_command(
    run: Path,
    *,
    profile: str,
    calibrate_on: int = 150,
    server: ServerOptions,
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
) -> int:
    """Predict a measured run of vLLM, and say how far off the simulator is.

    The run's arrivals and lengths go through the production scheduler with preset vllm. One
    constant, host time per step, is fitted to the first requests (with tensor parallelism also
    link time per token); errors are those of the others.

    Args:
        run: Requests with stamps, one JSON object a line (..._requests.jsonl.gz), as
            LLMServingSim's validation publishes them.
        profile: llmservingsim:PREFIX for a table of layer times, PREFIX_dense.csv.gz and so on; or
            a profile of roofline kind, by name or file.
        calibrate_on: The first so many requests, by arrival.
        server: The server that was measured.
        json: Write all numbers to this file; - writes only JSON to standard output.
    """
    try:
        check_targets(json=json)
        requests, meta = read_requests(run), read_meta(run)
        machine_ = server_of(server, meta, places_seen(requests[:calibrate_on]))
        model, layers = _model(profile, server, meta, run, (requests, machine_, calibrate_on))
        done = validate(requests, machine_, model, calibrate_on)
        _report(done, run, profile, layers, json)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"penstock validate: {error}\n")
        return 2
    return 0


def server_of(given: ServerOptions, meta: dict[str, Any], places: int | None = None) -> Server:
    """The server that was measured: what the options say, else the run's meta, else vLLM's own.

    Args:
        given: the options.
        meta: what is known of the run.
        places: requests in a step at most, as the run shows.

    Raises:
        ValueError: something is not the number that it must be, or cannot be replayed.
    """
    known = _engine(meta)
    memory = meta.get("kv_cache")
    blocks = memory.get("block_size") if isinstance(memory, dict) else None

    for name in ("data_parallel_size", "pipeline_parallel_size"):
        if known.get(name) not in (None, 1):
            msg = f"{name} is {known[name]!r}; only runs of one engine can be replayed, with 1"
            raise ValueError(msg)

    def number(name: str, own: int | None, default: int) -> int:
        value = own if own is not None else known.get(name) or default
        if not isinstance(value, int) or value < 1:
            msg = f"{name} is {value!r}; it must be a whole number of at least 1"
            raise ValueError(msg)
        return value

    return Server(
        kv_tokens=number("kv_tokens", given.kv_tokens, 0),
        block_size=number("block_size", given.block_size or blocks, _BLOCK),
        max_batch=number("max_num_seqs", given.max_batch, places or _MAX_BATCH),
        max_step_tokens=number("max_num_batched_tokens", given.prefill_budget, _STEP_TOKENS),
        parallel=number("tensor_parallel_size", given.parallel, 1),
        depth=given.depth or (2 if _plans_ahead(known, meta) else 1),
        prefix_cache=known.get("enable_prefix_caching") is not False
        if given.prefix_cache is None
        else given.prefix_cache,
    )


def _engine(meta: dict[str, Any]) -> dict[str, Any]:
    """The options that vLLM was started with, as far as they are known."""
    said = meta.get("engine_kwargs")
    return said if isinstance(said, dict) else {}


def _plans_ahead(known: dict[str, Any], meta: dict[str, Any]) -> bool:
    """Whether vLLM overlaps planning with computing."""
    said = known.get("async_scheduling")
    version = re.match(r"v?(\d+)\.(\d+)", str(meta.get("vllm_version", "")))
    newer = version is None or (int(version[1]), int(version[2])) >= _ASYNC_SINCE
    return newer if said is None else bool(said)


def _model(
    profile: str,
    given: ServerOptions,
    meta: dict[str, Any],
    run: Path,
    data: tuple[list[MeasuredRequest], Server, int],
) -> tuple[Hosted, int | None]:
    """The latency model, and the layers if it is a table's."""
    if not profile.startswith(profiles.TABLE):
        model = profiles.load(profile)
        if not hasattr(model, "with_host"):
            msg = f"profile {profile}: its kind has no host time to calibrate; use a roofline"
            raise ValueError(msg)
        return model, None  # type: ignore[return-value]  # hasattr has just said so
    prefix = profile.removeprefix(profiles.TABLE)
    # vLLM spreads experts over all GPUs of its one engine, or splits each among them.
    spread = data[1].parallel if _engine(meta).get("enable_expert_parallel") else 1
    layers = given.layers
    for text in (str(meta.get("model", "")), run.name, Path(prefix).name):
        layers = layers or layers_of(text)
    if layers is None:
        layers = min(
            depths(),
            key=lambda depth: (
                (validate(*data[:2], read_layer_table(prefix, depth, spread), data[2])).misfit
            ),
        )
    if layers < 1:
        msg = f"layers is {layers}; it must be at least 1"
        raise ValueError(msg)
    return read_layer_table(prefix, layers, spread), layers


def _report(
    done: Validation, run: Path, profile: str, layers: int | None, json: str | None
) -> None:
    if json is not None:
        data = {
            "schema": SCHEMA,
            "penstock": __version__,
            "command": command_line(),
            "run": str(run),
            "profile": profile,
            "layers": layers,
            "machine": machine(),
            **msgspec.to_builtins(done),
        }
        write_json(data, json)
        if json == STDOUT:
            return
    from rich.console import Console
    from rich.table import Table

    view = Table(title=f"{run.name}: {done.predicted} requests predicted", title_justify="left")
    for head in ("", "measured", "simulated", "error"):
        view.add_column(head, justify="right" if head else "left")
    for name, unit, scale in (("ttft", "s", 1.0), ("tpot", "ms", 1e3), ("e2e", "s", 1.0)):
        pair = (f"{scale * side[name]:.3f} {unit}" for side in (done.measured, done.simulated))
        view.add_row(f"mean {name}", *pair, f"{getattr(done.errors, f'{name}_mean'):+.1%}")
    view.add_row("e2e per request", "", "", f"{done.errors.e2e_per_request:.1%}")
    console = Console()
    console.print(view)
    words = f"from {done.calibrated_on} requests: host time {1e3 * done.host:.3f} ms per step"
    if done.link:
        words += f", link time {1e6 * done.link:.1f} us per token"
    console.print(words + (f"; {layers} layers" if layers else ""), highlight=False)
