"""What a client asked for, in its headers and its body, as arguments of a vLLM request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.server.errors import invalid
from penstock.server.slo import resolve
from penstock.settings import SLOClass
from penstock.vllm.intake import SLO_ARGUMENTS, TRACE

_NAMES = tuple(name.removeprefix("slo_") for name in SLO_ARGUMENTS)


class _Members(msgspec.Struct):
    """The members of a body that are looked at; the others are not even decoded."""

    slo: object = None
    use_beam_search: object = None
    trace_output_tokens: object = None


def asked(
    headers: Mapping[str, str], body: bytes, classes: Mapping[str, SLOClass], *, traced: bool
) -> dict[str, object]:
    """The promise, as far as it is not the class's own, and the hook for benchmarks.

    Beam search has no promise: each of its steps is a request of its own to the scheduler.

    Args:
        headers: names in lower case.
        body: of the request; one that is no JSON object asks for nothing.
        traced: whether the hook is there.

    Raises:
        ApiError: 400: a header or a member that cannot be right.
    """
    members = _members(body)
    if members.use_beam_search:
        return {}
    slo = members.slo
    if not isinstance(slo, dict | None):
        raise invalid("slo", f'slo is {slo!r}; it must be an object such as {{"ttft_ms": 500}}')
    given = _promise(headers, slo or {}, classes)
    length = members.trace_output_tokens
    if traced and length is not None:
        if type(length) is not int or not 1 <= length < 1 << 31:
            raise invalid(TRACE, f"{TRACE} is {length!r}; it must be an integer of at least 1")
        given[TRACE] = length
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


def _members(body: bytes) -> _Members:
    try:
        return msgspec.json.decode(body, type=_Members)
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:
        # vLLM's server takes what this takes: other encodings, and numbers that are none.
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        return _Members()
    if not isinstance(decoded, dict):
        return _Members()
    return _Members(*(decoded.get(name) for name in _Members.__struct_fields__))


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
        value = slo.get(name)
        if value is None:
            value = headers.get("x-slo-" + name.replace("_", "-"))
        if value is not None:
            given[argument] = promise.slo_class if name == "class" else float(value)
    return given
