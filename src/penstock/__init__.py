"""An LLM server whose scheduler meets latency SLOs.

Names are imported on first use, so that ``import penstock`` stays fast and the
scheduler can be used where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.core.policies import presets
    from penstock.core.sampling import SamplingParams
    from penstock.core.scheduler import Scheduler
    from penstock.core.types import SLO, Request
    from penstock.llm import LLM
    from penstock.sim.simulation import simulate

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "SLO",
    "Request",
    "SamplingParams",
    "Scheduler",
    "__version__",
    "presets",
    "simulate",
]

_HOMES = MappingProxyType(
    {
        "LLM": "penstock.llm",
        "Request": "penstock.core.types",
        "SLO": "penstock.core.types",
        "SamplingParams": "penstock.core.sampling",
        "Scheduler": "penstock.core.scheduler",
        "presets": "penstock.core.policies.presets",
        "simulate": "penstock.sim.simulation",
    }
)


def __getattr__(name: str) -> object:
    """Import an exported name from its home: PEP 562."""
    home = _HOMES.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module = import_module(home)
    return module if home.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
