"""The plug-in for vLLM: Penstock's scheduler decides, vLLM's engine runs what it decided.

``vllm serve MODEL --scheduler-cls penstock.vllm.Scheduler --middleware penstock.vllm.Middleware``.
Names are imported on first use: the scheduler lives in vLLM's engine process, the middleware in
its HTTP server.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.vllm.middleware import Middleware
    from penstock.vllm.scheduler import Scheduler
    from penstock.vllm.traced import TracedScheduler

__all__ = ["Middleware", "Scheduler", "TracedScheduler"]

_HOMES = MappingProxyType(
    {
        "Middleware": "penstock.vllm.middleware",
        "Scheduler": "penstock.vllm.scheduler",
        "TracedScheduler": "penstock.vllm.traced",
    }
)


def __getattr__(name: str) -> object:
    """Import an exported name from its home: PEP 562."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
