"""Which latency promise a request asks for: headers, the body's ``slo`` field, named classes.

A class is chosen by ``x-slo-class`` or ``slo.class`` (``default`` otherwise);
explicit bounds then replace the class's own, one by one.  Saying the same
thing twice is fine, saying two things is an error: nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from penstock.config import BOUNDS
from penstock.core.types import SLO, OnMiss
from penstock.server.errors import invalid
from penstock.settings import SLOClass

DEFAULT_CLASS = "default"
MIN_MS = 0.001
MAX_MS = 86_400_000.0


@dataclass(frozen=True, slots=True)
class Promise:
    """What was asked for."""

    slo_class: str
    slo: SLO
    on_miss: OnMiss


def resolve(
    headers: Mapping[str, str],
    body: Mapping[str, object] | None,
    classes: Mapping[str, SLOClass],
) -> Promise:
    """The promise of one request.

    Args:
        headers: request headers; names in lower case.
        body: the ``slo`` field, with ``class`` and ``ttft_ms`` ... ``e2e_ms``, already typed.
        classes: the configured classes.

    Raises:
        ApiError: 400, naming the header or field.
    """
    body = body or {}
    name = _once("x-slo-class", headers.get("x-slo-class"), "slo.class", body.get("class"))
    if name is None:
        name = DEFAULT_CLASS
    elif not isinstance(name, str) or name not in (*classes, DEFAULT_CLASS):
        param = "slo.class" if "class" in body else "x-slo-class"
        known = ", ".join(sorted({*classes, DEFAULT_CLASS}))
        raise invalid(param, f"{param} is {name!r}; it must be one of: {known}")
    chosen = classes.get(str(name), SLOClass())
    bounds: dict[str, float] = {}
    for bound in BOUNDS:
        header, field = f"x-slo-{bound}-ms", f"slo.{bound}_ms"
        given = _once(
            header,
            _milliseconds(header, headers.get(header)),
            field,
            _milliseconds(field, body.get(f"{bound}_ms")),
        )
        if isinstance(given, float):
            bounds[bound] = given / 1000
    return Promise(str(name), replace(chosen.slo, **bounds), chosen.on_miss)


def _milliseconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not MIN_MS <= number <= MAX_MS:
        span = f"[{MIN_MS}, {MAX_MS:.0f}]"
        msg = f"{name} is {value!r}; it must be a number of milliseconds in {span}"
        raise invalid(name, msg)
    return number


def _once(header: str, first: object, field: str, second: object) -> object:
    if first is not None and second is not None and first != second:
        msg = f"{field} is {second!r} but the header {header} is {first!r}; they must not differ"
        raise invalid(field, msg)
    return second if first is None else first
