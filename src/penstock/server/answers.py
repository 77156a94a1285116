"""Answers that are not completions, and the reading of bodies, for every application here."""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from penstock.server.errors import ApiError


def error_response(error: ApiError) -> Response:
    """An error as a response."""
    headers = {"content-type": "application/json", **error.headers}
    return Response(error.body(), error.status, headers)


def json_response(content: object, status: int = 200) -> Response:
    """Anything that msgspec can write, as a response."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """A request's body.

    Raises:
        ApiError: 413, it is longer than the limit in bytes.
    """
    length = request.headers.get("content-length", "0")
    too_long = ApiError(
        413, f"the body is longer than the limit of {limit} bytes", code="request_too_large"
    )
    # What is left of the body will not be read, so the connection cannot be used again.
    too_long.headers["connection"] = "close"
    if length.isdigit() and int(length) > limit:
        raise too_long
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
    return b"".join(parts)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What starlette refuses by itself: unknown routes, wrong methods."""
    assert isinstance(error, HTTPException)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    answer = ApiError(error.status_code, message, code=code, headers=error.headers)
    return error_response(answer)


async def on_exception(request: Request, error: Exception) -> Response:
    """A fault of ours, or a client that left."""
    del request
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    message = "an internal error; the server's log has the details"
    return error_response(ApiError(500, message, code="internal_error", kind="server_error"))
