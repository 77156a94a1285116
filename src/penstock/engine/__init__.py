"""The native engine: PyTorch, paged KV memory, Hugging Face model definitions."""

from penstock.engine.errors import CheckpointError, PlanError, UnsupportedModelError
from penstock.engine.loading import LoadedModel, load_model, load_random
from penstock.engine.native import NativeEngine

__all__ = [
    "CheckpointError",
    "LoadedModel",
    "NativeEngine",
    "PlanError",
    "UnsupportedModelError",
    "load_model",
    "load_random",
]
