"""What may be asked of the scheduler over HTTP, in vLLM's engine process: metrics, and why.

``GET /metrics`` is for Prometheus, ``GET /v1/penstock/requests/ID`` for ``penstock explain``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote
from wsgiref.simple_server import WSGIRequestHandler, make_server

import msgspec
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from penstock.server.errors import ApiError

if TYPE_CHECKING:
    from vllm.v1.request import Request

    Requests: TypeAlias = Iterable[Request]

REQUESTS = "/v1/penstock/requests/"
Standing: TypeAlias = dict[str, object]


def named(name: str, requests: Requests) -> list[Request]:
    """The open requests that are parts of one answer.

    vLLM adds to the name of an answer: before it the route's kind and the number of a choice,
    after it the number of a prompt and some random characters.

    Args:
        name: the answer's ``id``, or the client's own ``X-Request-Id``.
    """
    whole = re.compile(rf"(\d+_)?([a-z]+[-_])?{re.escape(name)}([-_]\d+)*(-[0-9a-f]{{8}})?")
    return [one for one in requests if whole.fullmatch(one.request_id)]


def serve(port: int, registry: CollectorRegistry, explain: Callable[[str], list[Standing]]) -> None:
    """Answer from threads of its own, until the process ends.

    Args:
        explain: where the parts of an answer stand; empty: there is no such answer.

    Raises:
        OSError: the port cannot be listened on.
    """
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if not path.startswith(REQUESTS):
            return metrics(environ, start_response)
        name = unquote(path.removeprefix(REQUESTS))
        choices = explain(name)
        status, body = "200 OK", b""
        if choices:
            answer = {"id": name, "object": "penstock.request", "choices": choices}
            body = msgspec.json.encode(answer)
        else:
            msg = f"request {name!r} is not open; it has ended or never was"
            status = "404 Not Found"
            body = ApiError(404, msg, code="request_not_found", param="request_id").body()
        start_response(status, [("content-type", "application/json")])
        return [body]

    server = make_server("", port, application, ThreadingWSGIServer, _Silent)
    Thread(target=server.serve_forever, name="penstock-http", daemon=True).start()


class _Silent(WSGIRequestHandler):
    """Writes no line for each request."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
