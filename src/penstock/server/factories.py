"""Which engine the engine process runs: the only place that knows them by name.

This module is imported by the engine process; what it imports for one kind of
engine, another kind does not pay for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.config import Config
from penstock.core.engine import Engine, Ticket
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.scheduler import Scheduler

_SCRIPTED_KV_TOKENS = 65_536


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process needs to begin; it travels as one line of JSON.

    Attributes:
        kind: which engine.
        options: its keyword arguments, with what was not configured left out.
        vocab_size: the tokenizer's; only the scripted engine needs to be told.
        preset, order, parameters, seed: the scheduler's.
        commands, events: addresses of the two sockets.
    """

    kind: Literal["native", "scripted"]
    model: str
    options: dict[str, int | float | str | bool]
    vocab_size: int
    preset: str
    order: str | None
    parameters: dict[str, int | float]
    seed: int
    commands: str = ""
    events: str = ""

    @classmethod
    def of(cls, config: Config, path: Path, vocab_size: int) -> EngineSpec:
        """The spec that a configuration asks for."""
        options = config.engine.model_dump(exclude={"model", "engine"}, exclude_none=True)
        return cls(
            kind=config.engine.engine,
            model=str(path),
            options=options,
            vocab_size=vocab_size,
            preset=config.scheduler.preset,
            order=config.scheduler.order,
            parameters=config.scheduler.parameters,
            seed=config.scheduler.seed,
        )


def build_engine(spec: EngineSpec) -> Engine:
    """Load the engine.

    Raises:
        Exception: whatever keeps the engine from loading, with its own words.
    """
    if spec.kind == "scripted":
        return _scripted(spec)
    from penstock.engine import NativeEngine

    options: dict[str, Any] = dict(spec.options)
    return NativeEngine.load(spec.model, **options)


def build_scheduler(spec: EngineSpec, engine: Engine) -> Scheduler:
    """The scheduler that feeds the engine."""
    policy = build_policy(spec.preset, spec.order, spec.seed, spec.parameters)
    return Scheduler(engine.capabilities, policy)


def build_policy(
    preset: str, order: str | None, seed: int, parameters: Mapping[str, float]
) -> Policy:
    """The policy that the settings name.

    Raises:
        ValueError: an unknown name or a value out of range; it names the parameter.
    """
    options: dict[str, Any] = dict(parameters)
    return presets.build(preset, seed=seed, order=order, **options)


def _scripted(spec: EngineSpec) -> Engine:
    from penstock.core.types import Capabilities, StepResult
    from penstock.testing import ScriptedEngine

    class PacedEngine(ScriptedEngine):
        """Takes as long as it says."""

        def collect(self, ticket: Ticket) -> StepResult:
            result = super().collect(ticket)
            time.sleep(result.seconds)
            return result

    size = int(spec.options["block_size"])
    kv_tokens = int(spec.options.get("kv_tokens", _SCRIPTED_KV_TOKENS))
    capabilities = Capabilities(
        kv_blocks=kv_tokens // size,
        block_size=size,
        max_batch=int(spec.options["max_batch"]),
        max_step_tokens=int(spec.options["max_step_tokens"]),
        max_request_tokens=int(spec.options.get("max_request_tokens", kv_tokens)),
        prefix_cache=bool(spec.options["prefix_cache"]),
    )
    return PacedEngine(capabilities, vocab_size=spec.vocab_size)
