"""A grid of simulated runs: the options of ``penstock simulate``, with several values for some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec

from penstock.sim.command import MachineOptions, RequestOptions, specs_of
from penstock.sim.spec import RunSpec, SpecError, digest_of, latency_model, policy_of

_REQUESTS = {field.name for field in fields(RequestOptions)}
_MACHINE = {field.name for field in fields(MachineOptions)} - {"parameters"}
_PARAMETER = "parameters."


class Axis(NamedTuple):
    """A field and the values that it takes, each in the field's type."""

    name: str
    values: tuple[Any, ...]


def parse_axis(text: str) -> Axis:
    """Read ``FIELD=V1,V2,...``, ``FIELD=V1;V2`` for values with commas, or ``FIELD=0-4``.

    Raises:
        SpecError: it is something else, or a value is not of the field's type.
    """
    name, equals, tail = text.partition("=")
    name = name.strip().replace("-", "_")
    kind = _kind(name)
    if not equals or kind is None:
        names = ", ".join(sorted(_REQUESTS | _MACHINE))
        msg = f"--over {text!r}: write FIELD=V1,V2,... with one of: {names}, parameters.NAME"
        raise SpecError(msg)
    pieces = [p.strip() for p in tail.split(";" if ";" in tail else ",") if p.strip()]
    if kind in {int, int | None}:
        pieces = [number for piece in pieces for number in _span(piece)]
    if not pieces:
        msg = f"--over {text!r} names no values; write FIELD=V1,V2,..."
        raise SpecError(msg)
    try:
        values = [_value(piece, kind) for piece in pieces]
    except msgspec.ValidationError as error:
        msg = f"--over {text!r}: {error}"
        raise SpecError(msg) from None
    for value in values:
        if values.count(value) > 1:
            msg = f"--over {text!r} has the value {value} twice"
            raise SpecError(msg)
    return Axis(name, tuple(values))


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Read several, for different fields.

    Raises:
        SpecError: see :func:`parse_axis`; or a field is named twice.
    """
    axes = [parse_axis(text) for text in texts]
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            msg = f"--over names {name} twice; give all of its values at once"
            raise SpecError(msg)
    return axes


def grid(asked: RequestOptions, given: MachineOptions, axes: Sequence[Axis] = ()) -> list[RunSpec]:
    """Every combination, each once; the last axis varies fastest, then the presets.

    A parameter that a preset does not have leaves it as it is.

    Raises:
        ValueError: options that do not go together.
        OSError: the trace cannot be read.
    """
    found: dict[str, RunSpec] = {}
    digests: dict[Path, str] = {}
    for values in product(*(axis.values for axis in axes)):
        chosen = dict(zip((axis.name for axis in axes), values, strict=True))
        for spec in _specs(asked, given, chosen, digests):
            found.setdefault(spec.key(), spec)
    specs = list(found.values())
    # What holds for all of a policy's or a profile's runs is refused before the first of them.
    for spec in specs:
        policy_of(spec)
    for spec in {spec.profile: spec for spec in specs}.values():
        latency_model(spec)
    return specs


def _specs(
    asked: RequestOptions,
    given: MachineOptions,
    chosen: dict[str, Any],
    digests: dict[Path, str],
) -> list[RunSpec]:
    parameters: dict[str, Any] = dict(given.parameters or {})
    parameters |= {
        name.removeprefix(_PARAMETER): value
        for name, value in chosen.items()
        if name.startswith(_PARAMETER)
    }
    requests = {name: value for name, value in chosen.items() if name in _REQUESTS}
    if "slo" in requests:
        requests["slo"] = [requests["slo"]]
    if "trace" in requests:
        requests["trace"] = Path(requests["trace"])
    machine = {name: value for name, value in chosen.items() if name in _MACHINE}
    asked = replace(asked, **requests)
    specs = specs_of(asked, replace(given, parameters=parameters, **machine))
    if asked.trace is None:
        return specs
    if asked.trace not in digests:
        digests[asked.trace] = digest_of(asked.trace)
    return [msgspec.structs.replace(spec, trace_digest=digests[asked.trace]) for spec in specs]


def _kind(name: str) -> Any:
    """The type of a field's values; None if there is no such field."""
    if name.startswith(_PARAMETER):
        return float | None
    if name in {"slo", "trace"}:
        return str
    if name == "cold_start":
        return int
    return _types().get(name) if name in _REQUESTS | _MACHINE else None


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(RunSpec)


def _value(piece: str, kind: Any) -> Any:
    if kind == float | None and piece.lower() == "none":
        return None
    return msgspec.convert(piece, kind, strict=False)


def _span(piece: str) -> list[str]:
    """``0-4`` is short for five whole numbers."""
    match = re.fullmatch(r"(\d+)-(\d+)", piece)
    if match is None:
        return [piece]
    return [str(number) for number in range(int(match[1]), int(match[2]) + 1)]
