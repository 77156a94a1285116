"""What may be asked of the scheduler over HTTP, in vLLM's engine process: metrics, and why.

``GET /metrics`` is for Prometheus, ``GET /v1/penstock/requests/ID`` for ``penstock explain``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from operator import itemgetter
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, make_server

import msgspec
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from penstock.core.types import RequestId
from penstock.server.errors import ApiError
from penstock.vllm.intake import CHOICES, CLIENTS_ID, extra_args

if TYPE_CHECKING:
    from vllm.v1.request import Request

    Requests: TypeAlias = Iterable[Request]

REQUESTS = "/v1/penstock/requests/"
_LONGEST = 256
_BEHIND = re.compile(r"behind \S+")
_ELSEWHERE = "its grammar is being compiled, or it is about to end"
# vLLM adds to an answer's id: the number of a choice, that of a prompt, random characters.
_RANDOM = re.compile(r"-[0-9a-f]{8}\Z")
_ADDED = re.compile(r"(?:(\d{1,9})_)?(.*?)((?:[-_]\d{1,9})?)", re.DOTALL)
Standing: TypeAlias = dict[str, object]


def named(name: str, requests: Requests) -> list[tuple[int, Request]]:
    """The open requests that are parts of one answer, and which choice each is.

    Args:
        name: the answer's ``id``, or the client's own ``X-Request-Id``.
    """
    found = []
    for one in requests:
        arguments = extra_args(one)
        added = _ADDED.fullmatch(_RANDOM.sub("", one.request_id))
        assert added is not None
        choice, answer, prompt = added.groups()
        # A chat's own id may end in a number.
        whole = answer if answer.startswith("cmpl-") or prompt[:1] == "_" else answer + prompt
        if name in {one.request_id, whole, arguments.get(CLIENTS_ID)}:
            choices = arguments.get(CHOICES)
            first = int(prompt[1:] or 0) * choices if isinstance(choices, int) else 0
            found.append((first + int(choice or 0), one))
    return sorted(found, key=itemgetter(0))


def stand(
    name: str, requests: Requests, explain: Callable[[RequestId], str | None]
) -> list[Standing]:
    """Where the parts of an open answer stand, and why those wait that do.

    Ids of others are left out: the port on which it is asked wants no key.

    Args:
        name: see :func:`named`.
        explain: the scheduler's word on one of the requests.
    """
    now = time.time()
    return [
        {
            "index": index,
            "prompt_tokens": one.num_prompt_tokens,
            "output_tokens": one.num_output_tokens,
            "age_s": round(now - one.arrival_time, 3),
            "explanation": _BEHIND.sub("behind another", explain(one.request_id) or _ELSEWHERE),
        }
        for index, one in named(name, requests)
    ]


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
        name = path.removeprefix(REQUESTS)
        choices = explain(name) if len(name) <= _LONGEST else []
        json = [("content-type", "application/json")]
        if choices:
            start_response("200 OK", json)
            answer = {"id": name, "object": "penstock.request", "choices": choices}
            return [msgspec.json.encode(answer)]
        msg = f"request {name!r} is not open; it has ended or never was"
        start_response("404 Not Found", json)
        return [ApiError(404, msg, code="request_not_found", param="request_id").body()]

    server = make_server("", port, application, ThreadingWSGIServer, _Silent)
    Thread(target=server.serve_forever, name="penstock-http", daemon=True).start()


class _Silent(WSGIRequestHandler):
    """Writes no line for each request."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
