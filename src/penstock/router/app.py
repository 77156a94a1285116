"""The routes of a router."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from penstock.router.service import Service, refused
from penstock.server.answers import (
    error_response,
    json_response,
    on_exception,
    on_http_exception,
    read_body,
)
from penstock.server.errors import ApiError
from penstock.server.metrics import CONTENT_TYPE
from penstock.server.requests import headers_of
from penstock.settings import HttpConfig

LIMITS = HttpConfig()
"""How large requests may be: as large as the server's are by default."""

_MODEL = "/v1/models/{model}"
Handler = Callable[[bytes, Mapping[str, str]], ASGIApp]


def build_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes = _Routes(service)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.answered(service.chat), methods=["POST"]),
            Route("/v1/completions", routes.answered(service.complete), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route(_MODEL.replace("}", ":path}"), routes.model),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
        ],
        exception_handlers={
            ApiError: routes.on_api_error,
            HTTPException: on_http_exception,
            ClientDisconnect: on_exception,  # or it is logged as a fault of ours, too
            Exception: on_exception,
        },
    )


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    def answered(self, handle: Handler) -> Callable[[Request], Awaitable[ASGIApp]]:
        """A route that reads a body and answers with a reply."""

        async def endpoint(request: Request) -> ASGIApp:
            raw = await read_body(request, LIMITS.max_body_bytes)
            return handle(raw, headers_of(request.scope["headers"]))

        return endpoint

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``: as the first backend listed them."""
        del request
        return json_response({"object": "list", "data": self._service.models})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        name = request.path_params["model"]
        for model in self._service.models:
            if model["id"] == name:
                return json_response(model)
        msg = f"model {name!r} does not exist"
        raise ApiError(404, msg, code="model_not_found", param="model")

    async def health(self, request: Request) -> Response:
        """``GET /health``: the router answers."""
        del request
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: requests will be taken."""
        del request
        if self._service.draining:
            return json_response({"ready": False, "reason": "shutting down"}, 503)
        backends = self._service.pool.open_backends
        if not backends:
            return json_response({"ready": False, "reason": "no backend is available"}, 503)
        return json_response({"ready": True, "backends": backends})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``: Prometheus text."""
        del request
        headers = {"content-type": CONTENT_TYPE}
        return Response(self._service.pool.exposition(), headers=headers)

    async def on_api_error(self, request: Request, error: Exception) -> Response:
        """Answer a refusal, and write it down."""
        assert isinstance(error, ApiError)
        # What a client writes must not become a label: each one is kept for ever.
        route = _MODEL if request.path_params else request.url.path
        refused(self._service, route, request.url.path, error)
        return error_response(error)
