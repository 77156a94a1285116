"""The command line.  Each command is imported when it is used, so that help is quick."""

from __future__ import annotations

import os
import sys
from typing import get_args

from cyclopts import App, ArgumentCollection, CoercionError

from penstock import __version__


def _only_whole(_app: App, _words: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse ``1.5`` where a whole number is wanted: cyclopts would round it."""
    for argument in arguments:
        if int not in (argument.hint, *get_args(argument.hint)):
            continue
        for token in argument.tokens:
            if not _is_whole(token.value):
                msg = f"{token.value} is not a whole number"
                raise CoercionError(msg=msg, argument=argument, token=token, target_type=int)


def _is_whole(text: str) -> bool:
    """False for a number with a fraction, or without an end; what is no number fails later."""
    try:
        return "." not in text or float(text).is_integer()
    except ValueError:
        return True


app = App(
    name="penstock",
    help="An LLM server whose scheduler meets latency SLOs.",
    version=__version__,
    config=_only_whole,
)
app.command(
    "penstock.server.command:serve",
    name="serve",
    help="Serve a model over an OpenAI-compatible HTTP API.",
)
app.command(
    "penstock.server.command:show_config",
    name="config",
    help="Print the effective configuration as TOML.",
)
app.command(
    "penstock.server.command:explain",
    name="explain",
    help="Say where an open request of a server stands and why it waits.",
)
app.command(
    "penstock.router.command:route",
    name="route",
    help="Route completions to several OpenAI-compatible servers, slice by slice.",
)
app.command(
    "penstock.bench.command:bench",
    name="bench",
    help="Drive an OpenAI-compatible endpoint and report goodput and attainment.",
)
app.command(
    "penstock.sim.command:simulate",
    name="simulate",
    help="Simulate presets on a load: the same scheduler on a virtual clock.",
)
app.command(
    "penstock.sim.sweep_command:sweep_command",
    name="sweep",
    help="Simulate a grid of presets, parameters, loads and seeds, in parallel.",
)
app.command(
    "penstock.sim.capacity_command:capacity_command",
    name="capacity",
    help="Find the largest load that keeps the SLO, or the fewest instances for a load.",
)
app.command(
    "penstock.sim.profiling.command:profile",
    name="profile",
    help="Make a profile of step times: of a live endpoint, or of recorded steps.",
)
app.command(
    "penstock.sim.validate_command:validate_command",
    name="validate",
    help="Predict a measured run of vLLM, and say how far off the simulator is.",
)
app.command(
    "penstock.bench.demo:demo",
    name="demo",
    help="Show what admission does to goodput, on this machine, with the included model.",
)


@app.command
def presets() -> None:
    """List the scheduling presets: their answers, their parameters, their source."""
    from penstock.core.policies.fleets import FLEETS
    from penstock.core.policies.presets import PRESETS

    for preset in PRESETS.values():
        settings = ", ".join(f"{key}={value}" for key, value in preset.parameters.items())
        print(preset.name)
        print(f"  {preset.source}")
        print(
            f"  order {preset.order} · admit {preset.admit_name} · share {preset.share}"
            f"{', ' * bool(preset.pack)}{preset.pack} · victim {preset.victim}"
        )
        print(f"  parameters: {settings or 'none'}")
    for fleet in FLEETS.values():
        settings = ", ".join(f"{key}={value}" for key, value in fleet.parameters.items())
        print(fleet.name)
        print(f"  {fleet.source}")
        batches = "packed by time" if fleet.packed else "in order of arrival"
        print(
            f"  batches {batches}{', of fixed size' if fleet.fixed else ''} · place {fleet.place}"
            f" · interval {fleet.intervals} · on each instance: {fleet.instance}"
        )
        print(f"  parameters: {settings}")


@app.command
def profiles() -> None:
    """List the step-time profiles that come with Penstock: machine, error, source."""
    from penstock.sim.profiles import find, names

    for name in names():
        profile = find(name)
        of = f" (of {profile.error['of']})" if "of" in profile.error else ""
        print(f"{name}: {profile.title}")
        print(f"  off by {float(profile.error['held_out_mape']):.1%} on held-out steps{of}")
        print(f"  {profile.source}")
        print(f"  {profile.note}")


@app.command
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Entry point of the ``penstock`` command."""
    try:
        sys.exit(app())
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
