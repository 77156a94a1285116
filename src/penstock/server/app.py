"""The routes, and what stands before them: API keys, draining, size limits."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock import __version__
from penstock.server.answers import (
    error_response,
    json_response,
    on_exception,
    on_http_exception,
    read_body,
)
from penstock.server.errors import ApiError
from penstock.server.metrics import CONTENT_TYPE
from penstock.server.reply import RAW_SEND
from penstock.server.requests import headers_of
from penstock.server.service import Service, request_id_of, shutting_down

_PROTECTED = "/v1/"


class Edge:
    """Refuses what must not reach a route: wrong keys, and new work while draining.

    It stands around the whole application and leaves the server's own ``send`` in the scope:
    replies write every token through it, past the wrappers of the layers between.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in service.config.http.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer."""
        error = self._refuse(scope) if scope["type"] == "http" else None
        if error is not None:
            await error_response(error)(scope, receive, send)
        else:
            scope[RAW_SEND] = send
            await self._app(scope, receive, send)

    def _refuse(self, scope: Scope) -> ApiError | None:
        limit = self._service.config.http.max_header_bytes
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limit:
            msg = f"the request's headers are longer than the limit of {limit} bytes"
            return ApiError(431, msg, code="headers_too_large")
        if not scope["path"].startswith(_PROTECTED):
            return None
        if self._keys and not self._authorized(headers_of(scope["headers"])):
            return ApiError(
                401,
                "a valid API key is required as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if self._service.draining and scope["method"] == "POST":
            retry = max(1, round(self._service.config.http.drain_seconds))
            return shutting_down(retry)
        return None

    def _authorized(self, headers: Any) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode()
        # Every key is compared, so that the time taken tells nothing about any of them.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def build_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes = _Routes(service)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.completion(service.chat), methods=["POST"]),
            Route("/v1/completions", routes.completion(service.complete), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model:path}", routes.model),
            Route("/v1/penstock/requests/{request_id}", routes.explain),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/version", routes.version),
            Route("/stats", routes.stats),
            Route("/", routes.page),
        ],
        exception_handlers={
            ApiError: routes.on_api_error,
            HTTPException: on_http_exception,
            # Named, since what is handled as any Exception is logged as a fault of ours, too.
            ClientDisconnect: on_exception,
            Exception: on_exception,
        },
    )
    return Edge(app, service)


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = files("penstock.server").joinpath("page.html").read_text(encoding="utf-8")

    def completion(
        self, handle: Callable[[bytes, Any], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[Any]]:
        """A route that reads a body and answers with a reply."""

        async def endpoint(request: Request) -> Any:
            headers = headers_of(request.scope["headers"])
            request_id_of(headers)
            async with self._service.taking_in():
                raw = await read_body(request, self._service.config.http.max_body_bytes)
                return await handle(raw, headers)

        return endpoint

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        del request
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        name = request.path_params["model"]
        if name != self._service.model:
            msg = f"model {name!r} does not exist; this server has {self._service.model!r}"
            raise ApiError(404, msg, code="model_not_found", param="model")
        return json_response(self._model())

    def _model(self) -> dict[str, object]:
        ready = self._service.client.ready
        return {
            "id": self._service.model,
            "object": "model",
            "created": int(self._service.started),
            "owned_by": "penstock",
            "max_model_len": ready.max_request_tokens if ready else None,
        }

    async def explain(self, request: Request) -> Response:
        """``GET /v1/penstock/requests/{id}``: why a request waits."""
        name = request.path_params["request_id"]
        reply = self._service.find(name)
        if reply is None:
            msg = f"request {name!r} is not open; it has ended or never was"
            raise ApiError(404, msg, code="request_not_found", param="request_id")
        now = time.monotonic()
        choices = [
            {
                "index": choice.index,
                "prompt_tokens": choice.prompt_tokens,
                "output_tokens": choice.tokens,
                "age_s": round(now - choice.times.arrival, 3),
                "explanation": await self._service.client.explain(choice.id) or "it has ended",
            }
            for choice in reply.choices
        ]
        return json_response({"id": name, "object": "penstock.request", "choices": choices})

    async def health(self, request: Request) -> Response:
        """``GET /health``: the front end answers."""
        del request
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: requests will be taken."""
        del request
        service = self._service
        if service.draining:
            return json_response({"ready": False, "reason": "shutting down"}, 503)
        if not service.client.alive:
            return json_response({"ready": False, "reason": "the engine is not loaded"}, 503)
        return json_response({"ready": True})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``: Prometheus text."""
        del request
        body = self._service.metrics.exposition()
        return Response(body, headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        del request
        return json_response({"version": __version__})

    async def stats(self, request: Request) -> Response:
        """``GET /stats``: what the live page shows."""
        del request
        service = self._service
        gauges, ready = service.client.gauges, service.client.ready
        return json_response(
            {
                "model": service.model,
                "preset": service.config.scheduler.preset,
                "version": __version__,
                "uptime_s": round(time.time() - service.started, 1),
                "ready": service.client.alive and not service.draining,
                "open": service.client.open_requests,
                "running": gauges.running if gauges else 0,
                "waiting": gauges.waiting if gauges else 0,
                "waiting_tokens": gauges.waiting_tokens if gauges else 0,
                "kv_usage": gauges.kv_usage if gauges else 0.0,
                "kv_tokens": ready.kv_tokens if ready else 0,
                "evictions": gauges.evictions if gauges else 0,
                "predicted_wait_s": round(service.client.load.predicted_wait, 3),
                "goodput_tokens_per_s": round(service.metrics.goodput_rate(time.monotonic()), 1),
                "classes": service.metrics.classes(),
            }
        )

    async def page(self, request: Request) -> Response:
        """``GET /``: the live page."""
        del request
        headers = {"content-security-policy": "default-src 'self' 'unsafe-inline'"}
        return HTMLResponse(self._page, headers=headers)

    async def on_api_error(self, request: Request, error: Exception) -> Response:
        """Answer a refusal, and write it down."""
        assert isinstance(error, ApiError)
        self._service.log.info(
            "request_refused",
            request_id=request.headers.get("x-request-id", "")[:128],
            path=request.url.path,
            status=error.status,
            code=error.code,
            param=error.param,
            message=error.message,
        )
        return error_response(error)
