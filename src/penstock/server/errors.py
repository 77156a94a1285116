"""Errors in the shape that OpenAI clients understand.

Every refusal names the parameter, the value and what would be right; ``code``
is stable and meant for programs, ``message`` for people.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class ApiError(Exception):
    """An answer that is not a completion.

    Args:
        status: HTTP status.
        message: for people.
        code: for programs.
        kind: OpenAI's ``type``.
        param: the request field at fault, if one is.
        headers: extra response headers.
        extra: extra members of the error object, such as ``predicted_wait_s``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                    **self.extra,
                }
            }
        )

    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A request that is wrong in one field."""
    return ApiError(400, message, code=code, param=param)


def too_busy(
    message: str, code: str, wait: float, *, retry_after: int, limit: str | None = None
) -> ApiError:
    """A refusal for load.

    Args:
        wait: predicted wait in seconds.
        retry_after: whole seconds after which to come back.
        limit: name of the limit that was hit.
    """
    return ApiError(
        429,
        message,
        code=code,
        kind="rate_limit_error",
        headers={"retry-after": str(retry_after)},
        extra={"predicted_wait_s": round(wait, 3), "limit": limit},
    )


def unavailable(message: str, code: str, retry: int = 1) -> ApiError:
    """The server cannot serve anyone just now."""
    return ApiError(
        503, message, code=code, kind="server_error", headers={"retry-after": str(retry)}
    )


def expired(detail: str) -> ApiError:
    """A deadline passed and the request's class says to give up.

    504 with ``x-should-retry: false``: an SDK that retried it blindly would
    add load exactly when there is too much of it.
    """
    return ApiError(
        504,
        f"the request's deadline passed before it was served: {detail or 'its SLO was missed'}",
        code="deadline_exceeded",
        kind="timeout_error",
        headers={"x-should-retry": "false"},
    )
