"""What vLLM's HTTP server lacks for promises: headers in, honest refusals out.

For ``--middleware penstock.vllm.Middleware``.  It gives each request an
:class:`~penstock.vllm.exchange.Exchange` that vLLM's client of its engine is watched for: there
``x-slo-...`` headers and the body's ``slo`` become arguments that reach the scheduler, and there it
is seen first that the scheduler ended a request (:mod:`penstock.vllm.verdict`).  Such an answer
gets the status that it deserves: 429 with ``Retry-After``, 504, 400; or, once a stream has begun,
an error event.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.vllm.exchange import CURRENT, Exchange, watch
from penstock.vllm.settings import PluginConfig, read


class Middleware:
    """Stands before vLLM's HTTP application.

    Args:
        app: what comes behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._settings: PluginConfig | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._settings is None:  # vLLM's engine and configuration are there by now
            state = scope["app"].state
            watch(state.engine_client)
            self._settings = read(state.vllm_config.additional_config)
        exchange = Exchange(scope, receive, send, self._settings)
        token = CURRENT.set(exchange)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            if not await exchange.settle():
                raise
        finally:
            CURRENT.reset(token)
