"""``penstock profile``: step times of a live endpoint, or of recorded steps, as a profile."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cyclopts import Parameter

from penstock.bench.client import Target
from penstock.bench.command import first_model
from penstock.bench.drive import HookError
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.fit import mape
from penstock.core.forecast.latency.tiles import Tiles, fit_steps
from penstock.sim.profiles import Profile
from penstock.sim.profiling.endpoint import Grid, Profiled, run_profile
from penstock.sim.profiling.probes import Probe, ProbeError
from penstock.sim.profiling.steps import samples_of, split
from penstock.sim.recording import read_steps

_FEWEST_STEPS = 250


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class ProbeOptions:
    """What is probed; an endpoint must serve nobody else meanwhile.

    Attributes:
        url: Base address of the endpoint, with or without /v1.
        model: The model's name there; by default the first that /v1/models lists.
        key_env: Environment variable that holds the API key, if one is needed.
        timeout: Seconds after which a request counts as failed.
        token_range: Token ids LOW:HIGH of random prompts, away from special tokens.
        batches: Numbers of streams that decode at a time, separated by commas.
        prompts: Lengths of their prompts.
        joins: Lengths of prompts that are sent while they decode.
        step_tokens: Most tokens that the endpoint computes in a step (--max-step-tokens here,
            --max-num-batched-tokens of vLLM). Longer joins are cut into such steps.
        repeats: How often each of the joins is sent.
        seed: Of the prompts.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 600.0
    token_range: str = "300:1300"  # noqa: S105
    batches: str = "1,2,4,8,16,32"
    prompts: str = "64,512"
    joins: str = "16,64,256"
    step_tokens: int = 512
    repeats: int = 5
    seed: int = 0


def profile(
    out: Path,
    *,
    steps: tuple[Path, ...] = (),
    name: str | None = None,
    probing: ProbeOptions | None = None,
) -> int:
    """Make a profile of step times: of a live endpoint, or of steps that it recorded.

    The exit code is 0 if a profile was written, 1 if the endpoint failed, 2 if options are wrong.

    Args:
        out: The file to write, for --profile.
        steps: Fit the steps of this file ('penstock serve --record-steps') instead of probing; of
            several instances, give the option once for each file.
        name: What the profile is called; by default the file's name.
        probing: What is probed.
    """
    probing = probing or ProbeOptions()
    title = name or out.stem
    try:
        if steps:
            return _from_steps(out, steps, title)
        target, grid, tokens = _checked(probing)
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    try:
        if not target.model:
            target = replace(target, model=first_model(target))
        done = run_profile(target, grid, tokens, seed=probing.seed, on_probe=_progress)
    except (ProbeError, HookError, ValueError) as error:
        return _fail(error, 1)
    source = f"probes of {target.model} at {target.root}"
    return _write(out, title, done.model, source, done.held_out_error, _endpoint_words(done))


def _from_steps(out: Path, steps: Sequence[Path], title: str) -> int:
    recorded = [step for file in steps for step in read_steps(file)]
    if len(recorded) < _FEWEST_STEPS:
        files = ", ".join(map(str, steps))
        msg = f"--steps {files}: it has {len(recorded)} steps; at least {_FEWEST_STEPS} are needed"
        raise ValueError(msg)
    fitted, held_out = split(samples_of(recorded))
    model = fit_steps(fitted)
    words = [
        ("steps", f"{len(fitted)} fitted, {len(held_out)} held out"),
        ("error, fitted steps", f"{mape(model, fitted):.1%}"),
    ]
    source = f"{len(recorded)} recorded steps"
    return _write(out, title, model, source, mape(model, held_out), words)


def _checked(given: ProbeOptions) -> tuple[Target, Grid, tuple[int, int]]:
    grid = Grid(
        _numbers("batches", given.batches),
        _numbers("prompts", given.prompts),
        _numbers("joins", given.joins),
        given.step_tokens,
        given.repeats,
    )
    low, _, high = given.token_range.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) - 1):
        msg = f"token_range is {given.token_range!r}; write LOW:HIGH, such as 300:1300"
        raise ValueError(msg)
    key = os.environ.get(given.key_env, "")
    target = Target(given.url, given.model or "", key=key, timeout=given.timeout)
    return target, grid, (int(low), int(high))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        msg = f"{name} is {text!r}; write whole numbers separated by commas, such as 1,4,16"
        raise ValueError(msg)
    return tuple(map(int, parts))


def _endpoint_words(done: Profiled) -> list[tuple[str, str]]:
    return [
        ("samples", f"{len(done.fitted)} fitted, {len(done.held_out)} held out"),
        ("error, fitted probes", f"{done.error:.1%}"),
        ("before the first token", f"{1000 * done.edge:.2f} ms beyond the steps (not in them)"),
    ]


def _write(
    out: Path,
    title: str,
    model: Affine | Tiles,
    source: str,
    error: float,
    words: Sequence[tuple[str, str]],
) -> int:
    """Write the profile, and say what is in it."""
    from rich.console import Console
    from rich.table import Table

    made = Profile(
        name=title,
        title=title,
        kind="tiles" if isinstance(model, Tiles) else "affine",
        coefficients={name: float(f"{value:.5g}") for name, value in asdict(model).items()},
        source=source,
        error={"held_out_mape": round(error, 4)},
    )
    try:
        made.save(out)
    except OSError as failed:
        return _fail(failed, 2)
    view = Table(title=f"{title}: {source}", title_justify="left", show_header=False)
    for row in (*_prices(model), *words, ("error, held out", f"{error:.1%}")):
        view.add_row(*row)
    console = Console()
    console.print(view)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return 0


def _prices(model: Affine | Tiles) -> list[tuple[str, str]]:
    tiles = []
    if isinstance(model, Tiles):
        tiles = [
            (f"{model.rows:g} tokens, or fewer", f"{1e6 * model.tile:.1f} us"),
            ("a chunk of a prompt", f"{1e6 * model.chunk:.1f} us"),
        ]
    return [
        *tiles,
        ("a step", f"{1e3 * model.step:.3f} ms"),
        ("a decoding request", f"{1e6 * model.request:.1f} us"),
        ("a prompt token", f"{1e6 * model.token:.2f} us"),
        ("1,000 KV tokens attended to", f"{1e9 * model.context:.2f} us"),
        ("1,000 x 1,000 tokens of prompt attention", f"{1e9 * model.work:.2f} ms"),
    ]


def _progress(probe: Probe) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"probed {probe.batch} streams with prompts of {probe.prompt} tokens\n")


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"penstock profile: {error}\n")
    return code
