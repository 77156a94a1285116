"""Which engine the engine process runs: the only place that knows them by name.

This module is imported by the engine process; what it imports for one kind of
engine, another kind does not pay for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from penstock.core.engine import KV, Engine, Ticket
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, StepResult
from penstock.settings import Config
from penstock.sim.recording import RecordingEngine, StepFile, StepRecord

if TYPE_CHECKING:
    from penstock.text.tokenizer import TextTokenizer

MADE_UP_KV_TOKENS = 65_536
"""KV memory of engines that have none, unless it is configured."""

_WORDS = 4096


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process needs to begin; it travels as one line of JSON.

    Attributes:
        kind: which engine.
        options: its keyword arguments, with what was not configured left out.
        vocab_size: the tokenizer's; only engines without a model need to be told.
        words, eos_ids: for the simulated engine: what it may say, and how it ends.
        profile, speed: of the simulated engine.
        record_steps: file to which measured steps go; empty for none.
        prices: whether to learn what steps cost, and say it.
        kv_transport: what carries KV to other instances; empty: nothing does.
        preset, order, parameters, seed: the scheduler's.
        commands, events: addresses of the two sockets.
    """

    kind: Literal["native", "scripted", "sim"]
    model: str
    options: dict[str, int | float | str | bool]
    vocab_size: int
    preset: str
    order: str | None
    parameters: dict[str, int | float]
    seed: int
    words: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    profile: str = ""
    speed: float = 1.0
    record_steps: str = ""
    prices: bool = False
    kv_transport: str = ""
    commands: str = ""
    events: str = ""

    @classmethod
    def of(cls, config: Config, path: Path, text: TextTokenizer) -> EngineSpec:
        """The spec that a configuration asks for, with the tokenizer of its model."""
        simulated = config.engine.engine == "sim"
        options = config.engine.model_dump(exclude={"model", "engine"}, exclude_none=True)
        return cls(
            kind=config.engine.engine,
            model=str(path),
            options=options,
            vocab_size=text.vocab_size,
            preset=config.scheduler.preset,
            order=config.scheduler.order,
            parameters=config.scheduler.parameters,
            seed=config.scheduler.seed,
            words=text.printable_ids(_WORDS) if simulated else (),
            eos_ids=text.eos_ids if simulated else (),
            profile=config.sim.profile or "",
            speed=config.sim.speed,
            # Instances have another working directory.
            record_steps=str(config.bench.record_steps.absolute())
            if config.bench.record_steps
            else "",
        )


def build_engine(spec: EngineSpec, observe: Callable[[StepRecord], object] | None = None) -> Engine:
    """Load the engine.

    Args:
        observe: told of every step.

    Raises:
        Exception: whatever keeps the engine from loading, with its own words.
    """
    engine = _load(spec)
    if observe is not None:
        engine = RecordingEngine(engine, observe)
    if spec.record_steps:
        file = StepFile(Path(spec.record_steps))
        engine = RecordingEngine(engine, file.add, close=file.close)
    return engine


def _load(spec: EngineSpec) -> Engine:
    if spec.kind == "scripted":
        return _scripted(spec)
    if spec.kind == "sim":
        return _simulated(spec)
    from penstock.engine import NativeEngine

    options: dict[str, Any] = dict(spec.options)
    return NativeEngine.load(spec.model, **options)


class TensorCodec(NamedTuple):
    """How KV becomes one tensor where it is, with what tells its parts apart, and KV again.

    ``sample`` makes a small KV on a device, to try a transport with.
    """

    flat: Callable[[Any], tuple[Any, Any]]
    from_flat: Callable[[Any, Any], KV]
    sample: Callable[[str], KV]


class KVCodec(NamedTuple):
    """How KV of one kind of engine becomes bytes, and KV again, and one of parts in order."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], KV]
    join: Callable[[Sequence[Any]], KV]
    tensors: TensorCodec | None = None


def kv_codec(kind: str) -> KVCodec:
    """Of a kind of engine."""
    if kind == "native":
        from penstock.engine.handoff import LayerKV

        tensors = TensorCodec(LayerKV.flat, LayerKV.from_flat, LayerKV.sample)
        return KVCodec(LayerKV.to_bytes, LayerKV.from_bytes, LayerKV.join, tensors)
    if kind == "sim":
        from penstock.sim.kv import SimKV

        return KVCodec(msgspec.msgpack.encode, msgspec.msgpack.Decoder(SimKV).decode, SimKV.join)
    from penstock.testing.scripted import ScriptedKV

    decode = msgspec.msgpack.Decoder(ScriptedKV).decode
    return KVCodec(msgspec.msgpack.encode, decode, ScriptedKV.join)


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
    for name in presets.OPTIONS.intersection(parameters):
        msg = f"{name!r} is no parameter of a preset; some of these are settings of their own"
        raise ValueError(msg)
    options: dict[str, Any] = dict(parameters)
    return presets.build(preset, seed=seed, order=order, **options)


def _scripted(spec: EngineSpec) -> Engine:
    from penstock.testing import ScriptedEngine

    class PacedEngine(ScriptedEngine):
        """Takes as long as it says."""

        def collect(self, ticket: Ticket) -> StepResult:
            result = super().collect(ticket)
            time.sleep(result.seconds)
            return result

    return PacedEngine(_made_up(spec), vocab_size=spec.vocab_size)


def _simulated(spec: EngineSpec) -> Engine:
    from penstock.sim import profiles
    from penstock.sim.served import ServedEngine

    return ServedEngine(
        _made_up(spec),
        profiles.load(spec.profile),
        vocab_size=spec.vocab_size,
        words=spec.words,
        eos_ids=spec.eos_ids,
        speed=spec.speed,
        seed=spec.seed,
    )


def _made_up(spec: EngineSpec) -> Capabilities:
    """Of an engine without a model."""
    size = int(spec.options["block_size"])
    kv_tokens = int(spec.options.get("kv_tokens", MADE_UP_KV_TOKENS))
    return Capabilities(
        kv_blocks=kv_tokens // size,
        block_size=size,
        max_batch=int(spec.options["max_batch"]),
        max_step_tokens=int(spec.options["max_step_tokens"]),
        max_request_tokens=int(spec.options.get("max_request_tokens", kv_tokens)),
        prefix_cache=bool(spec.options["prefix_cache"]),
        swap_tokens=int(spec.options.get("swap_tokens", 0)),
    )
