"""What a client asked for, in its headers and its body, as arguments of a vLLM request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.server.errors import invalid
from penstock.server.slo import resolve
from penstock.settings import SLOClass
from penstock.vllm.intake import SLO_ARGUMENTS, TRACE

_NAMES = tuple(name.removeprefix("slo_") for name in SLO_ARGUMENTS)


def asked(
    headers: Mapping[str, str], body: bytes, classes: Mapping[str, SLOClass]
) -> dict[str, object]:
    """The promise, as far as it is not the class's own, and the hook for benchmarks.

    Beam search has no promise: each of its steps is a request of its own to the scheduler.

    Args:
        headers: names in lower case.
        body: of the request; one that is no JSON object asks for nothing.

    Raises:
        ApiError: 400: a header or a member that cannot be right.
    """
    decoded = _decoded(body)
    if decoded.get("use_beam_search"):
        return {}
    slo = decoded.get("slo")
    if not isinstance(slo, dict | None):
        raise invalid("slo", f'slo is {slo!r}; it must be an object such as {{"ttft_ms": 500}}')
    given = _promise(headers, slo or {}, classes)
    if TRACE in decoded:
        given[TRACE] = decoded[TRACE]
    return given


def checked(promise: dict[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """The promise, once it is clear that ``more`` (vLLM's ``vllm_xargs``) says nothing else.

    Raises:
        ApiError: 400: it does.
    """
    for name in promise.keys() & more.keys():
        if promise[name] != more[name]:
            msg = f"vllm_xargs.{name} is {more[name]!r}, but the promise says {promise[name]!r}"
            raise invalid(f"vllm_xargs.{name}", f"{msg}; they must not differ")
    return promise


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _promise(
    headers: Mapping[str, str], slo: dict[str, Any], classes: Mapping[str, SLOClass]
) -> dict[str, object]:
    """What was asked for, as arguments; the class's own bounds are not among them."""
    unknown = sorted(slo.keys() - set(_NAMES))
    if unknown:
        words = ", ".join(sorted(_NAMES))
        raise invalid(f"slo.{unknown[0]}", f"slo.{unknown[0]} is unknown; slo has: {words}")
    promise = resolve(headers, slo, classes)
    given: dict[str, object] = {}
    for name, argument in zip(_NAMES, SLO_ARGUMENTS, strict=True):
        value = slo.get(name, headers.get("x-slo-" + name.replace("_", "-")))
        if value is not None:
            given[argument] = promise.slo_class if name == "class" else float(value)
    return given
