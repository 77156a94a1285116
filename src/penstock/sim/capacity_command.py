"""``penstock capacity``: how much load a configuration sustains, from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from penstock import __version__
from penstock.bench.result import command_line, machine, share
from penstock.sim.capacity import BOUNDS, UNITS, Capacity, Search, Searched, capacities
from penstock.sim.command import MachineOptions, RequestOptions
from penstock.sim.grid import grid
from penstock.sim.interval import Interval
from penstock.sim.output import STDOUT, check_targets, write_json
from penstock.sim.parallel import default_workers
from penstock.sim.spec import SpecError, workload_of

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
_INTERRUPTED = 130


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class SearchOptions:
    """What to look for.

    Attributes:
        attainment: Share of the requests that must meet their SLO.
        find: rate, clients or speed: the largest that is sustained. instances: the fewest that
            sustain the load that is given. By default clients with --clients, speed with a
            trace's own times, else rate.
        seeds: How many seeds, from --seed on.
        between: Bounds LOW:HIGH of the search.
        tolerance: How close to the edge the search goes, as a share of the load.
        jobs: Processes; by default one per core.
        json: Write all numbers to this file as well; - writes only JSON to standard output.
    """

    attainment: float = 0.99
    find: Searched | None = None
    seeds: int = 5
    between: str | None = None
    tolerance: float = 0.02
    jobs: int | None = None
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None


def capacity_command(
    *,
    search: SearchOptions | None = None,
    requests: RequestOptions | None = None,
    machine_options: MachineOptions | None = None,
) -> int:
    """Find the largest load that keeps a share of the requests within their SLO, by bisection.

    Takes the options of 'penstock simulate'; with several presets their capacities are compared
    seed by seed. Each seed (its lengths, arrivals, classes and draws) has a search of its own. The
    interval is Student's 95 % interval of the mean over seeds: about where the mean of many more
    seeds would lie, the search's tolerance included. It is not a bound for a single day; 'every
    seed' is the load that was sustained under each of them.

    The exit code is 0 if an answer was found for every preset, 1 if a search ended at a bound,
    2 if options are wrong, 130 after an interruption.

    Args:
        search: What to look for.
        requests: What is asked for.
        machine_options: What serves them.
    """
    search = search or SearchOptions()
    asked = requests or RequestOptions()
    try:
        check_targets(json=search.json)
        find = search.find or _find(asked)
        sought = _search(search, find, asked)
        if search.seeds < 1:
            msg = f"seeds is {search.seeds}; it must be at least 1"
            raise SpecError(msg)
        specs = grid(_placed(asked, find), machine_options or MachineOptions())
        workload_of(specs[0])  # options that are wrong for all are refused before the first run
        seeds = range(asked.seed, asked.seed + search.seeds)
        workers = default_workers() if search.jobs is None else search.jobs
        found = capacities(specs, sought, seeds, workers)
        _write(found, sought, search.json)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"penstock capacity: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("penstock capacity: interrupted\n")
        return _INTERRUPTED
    return 0 if all(one.mean is not None for one in found) else 1


def _find(asked: RequestOptions) -> Searched:
    if asked.clients is not None:
        return "clients"
    if asked.arrivals == "trace":
        return "speed"
    return "speed" if asked.trace is not None and asked.rate is None else "rate"


def _search(options: SearchOptions, find: Searched, asked: RequestOptions) -> Search:
    low, high = BOUNDS[find]
    if options.between is not None:
        try:
            low, high = map(float, options.between.split(":"))
        except ValueError:
            msg = f"between is {options.between!r}; write LOW:HIGH, as 0.5:20"
            raise SpecError(msg) from None
    placed = _placed(asked, find)
    given = {"rate": placed.rate, "clients": placed.clients, "speed": placed.speed}.get(find)
    start = 1.0 if given is None else float(given)
    if find == "rate":
        start *= asked.speed
    return Search(
        find=find, attainment=options.attainment, low=low, high=high, start=start,
        tolerance=options.tolerance,
    )  # fmt: skip


def _placed(asked: RequestOptions, find: Searched) -> RequestOptions:
    """With a value for what is searched, so that the options are complete."""
    if find == "rate":
        return replace(asked, rate=1.0 if asked.rate is None else asked.rate)
    if find == "clients":
        return replace(asked, clients=1 if asked.clients is None else asked.clients)
    if find == "speed" and (asked.rate is not None or asked.clients is not None):
        msg = "--find speed replays a trace's own times; leave --rate and --clients out"
        raise SpecError(msg)
    return asked


def to_dict(found: Sequence[Capacity], search: Search) -> dict[str, object]:
    """Capacities as plain data: what ``--json`` writes."""
    return {
        "schema": SCHEMA,
        "penstock": __version__,
        "command": command_line(),
        "machine": machine(),
        "search": msgspec.to_builtins(search),
        "unit": UNITS[search.find],
        "capacities": [_one(one) for one in found],
    }


def _one(one: Capacity) -> dict[str, Any]:
    return {"policy": one.spec.policy_name, **msgspec.to_builtins(one)}


def _write(found: Sequence[Capacity], search: Search, json: str | None) -> None:
    if json is not None:
        write_json(to_dict(found, search), json)
        if json == STDOUT:
            return
    from rich.console import Console

    console = Console()
    console.print(table(found, search))
    for one in found:
        for note in one.notes:
            console.print(f"{one.spec.policy_name}: {note}", highlight=False, markup=False)


def table(found: Sequence[Capacity], search: Search) -> Table:
    """A row per configuration."""
    from rich.table import Table

    unit = UNITS[search.find]
    what = "fewest instances" if search.find == "instances" else f"largest load, {unit}"
    view = Table(
        title=f"{what}, with {share(search.attainment)} of the requests within their SLO",
        title_justify="left",
    )
    heads = ("policy", f"mean {unit}", "95 % interval", "every seed", "attainment", "goodput tok/s")
    for i, head in enumerate((*heads, "to the first") if len(found) > 1 else heads):
        view.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for place, one in enumerate(found):
        cells = (
            one.spec.policy_name,
            "-" if one.mean is None else _figure(one.mean.mean),
            _range(one.mean),
            "-" if one.safe is None else _figure(one.safe),
            share(one.attainment),
            "-" if one.goodput_output_tps is None else f"{one.goodput_output_tps:.0f}",
        )
        view.add_row(*cells, *(() if len(found) == 1 else (_ratio(place, one.to_first),)))
    return view


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _range(value: Interval | None) -> str:
    if value is None or value.low is None or value.high is None:
        return "-"
    return f"{_figure(value.low)} to {_figure(value.high)}"


def _ratio(place: int, value: Interval | None) -> str:
    if value is None:
        return "-" if place else "1"
    return f"{value.mean:.2f} ({_range(value)})" if value.low is not None else f"{value.mean:.2f}"
