"""How a backend fails, and what a client is told of it."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import msgspec

from penstock.server.errors import ApiError, unavailable

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises: a string may be no UTF-8, and objects may be nested too deep to be read."""

_MOST_WORDS = 500


class Kind(StrEnum):
    """What went wrong; the label in metrics."""

    BUSY = "busy"
    CONNECTION = "connection"
    ERROR = "error"
    SILENT = "silent"
    CUT = "cut"


class BackendError(Exception):
    """A backend did not do what it was asked; another one may.

    Args:
        where: the backend's address.
        message: what happened there.
        retry_after: seconds after which it wants to be asked again.
    """

    def __init__(
        self, kind: Kind, where: str, message: str, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{where}: {message}")
        self.kind = kind
        self.retry_after = retry_after


def answer_to(error: BackendError, attempts: int) -> ApiError:
    """What a client is told when nobody else is asked any more."""
    message = f"no backend completed the request; {attempts} attempts failed, the last at {error}"
    return ApiError(502, message, code="backend_failed", kind="server_error")


def busy(reasons: list[str], retry: float) -> ApiError:
    """429: every backend has refused for load; why, and in how many seconds to come back."""
    message = f"every backend is busy: {'; '.join(reasons)}"
    headers = {"retry-after": str(max(1, math.ceil(retry)))}
    return ApiError(429, message, code="backends_busy", kind="rate_limit_error", headers=headers)


def nobody(reasons: list[str], retry: float) -> ApiError:
    """503: no backend takes requests; why, for each."""
    why = "; ".join(reasons)
    return unavailable(
        f"no backend is available: {why}", "no_backend", min(3600, max(1, math.ceil(retry)))
    )


def error_of(status: int, headers: Any, where: str, raw: bytes) -> ApiError | BackendError:
    """What an HTTP status of 300 or more means.

    The client's own mistakes and answers that say they should not be tried again are its to hear;
    everything else is the backend's failure.
    """
    fault = _fault(raw)
    message = _words(fault) or raw[:_MOST_WORDS].decode(errors="replace") or f"HTTP {status}"
    retry_after = _seconds(headers.get("retry-after"))
    if status == 429:
        return BackendError(Kind.BUSY, where, f"HTTP 429: {message}", retry_after)
    final = str(headers.get("x-should-retry", "")).lower() == "false"
    if not 400 <= status < 500 and not final:
        return BackendError(Kind.ERROR, where, f"HTTP {status}: {message}", retry_after)
    passed = {"x-should-retry": "false"} if final else {}
    return _passed_on(status, fault, message, passed)


def error_in_stream(fault: dict[str, Any], where: str) -> ApiError | BackendError:
    """What an error event means."""
    message = _words(fault) or "an error without words"
    if fault.get("code") == "deadline_exceeded":
        return _passed_on(504, fault, message, {"x-should-retry": "false"})
    return BackendError(Kind.ERROR, where, f"error in the stream: {message}")


def _passed_on(
    status: int, fault: dict[str, Any], message: str, headers: dict[str, str]
) -> ApiError:
    return ApiError(
        status,
        message,
        code=str(fault.get("code") or "backend_refused"),
        kind=str(fault.get("type") or "invalid_request_error"),
        param=fault["param"] if isinstance(fault.get("param"), str) else None,
        headers=headers,
    )


def _fault(raw: bytes) -> dict[str, Any]:
    """The error object: OpenAI's, or the flat one of older servers."""
    try:
        body = msgspec.json.decode(raw)
    except NOT_JSON:
        return {}
    if not isinstance(body, dict):
        return {}
    inner = body.get("error")
    return inner if isinstance(inner, dict) else body


def _words(fault: dict[str, Any]) -> str:
    return str(fault.get("message") or fault.get("detail") or "")[:_MOST_WORDS]


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text) if text else math.nan
    except ValueError:  # a date: servers of models do not send these
        return None
    return seconds if 0 <= seconds < math.inf else None
