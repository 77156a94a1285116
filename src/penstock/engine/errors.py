"""What can go wrong in the engine, by whose doing."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """This model cannot run here correctly; the message names its type and the reason."""

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(f"model type {model_type!r} is not supported: {reason}")
        self.model_type = model_type


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, although its model type could be."""


class PlanError(RuntimeError):
    """A plan that breaks the protocol of :class:`penstock.core.engine.Engine`."""


class KVOverflowError(PlanError):
    """A plan needs more KV blocks than there are."""
