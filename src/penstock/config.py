"""The configuration tree: a TOML file, then the environment, then flags.

Each field is declared once, with its type, range, default and words; the words
are its documentation and its command-line help.  ``max_waiting`` of section
``admission`` is ``[admission] max_waiting`` in a file, ``PENSTOCK_MAX_WAITING``
in the environment and ``--max-waiting`` on the command line.  Later sources
win, and every message about a value says which source it came from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from penstock.core.types import SLO, OnMiss, Role

ENV_PREFIX = "PENSTOCK_"
BOUNDS = ("ttft", "tpot", "gap", "e2e")
SLO_FORM = "name=ttft:0.5,tpot:0.03,gap:0.2,e2e:10,on_miss:keep|demote|expire"


class ConfigError(Exception):
    """A configuration that cannot be used; the message names the source, the value and the rule."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def changed(self) -> set[str]:
        """Names of the fields that say something else than their default.

        Whether a field was given is not asked: what ``penstock config`` prints gives them all.
        """
        known = type(self).model_fields.items()
        default = {name: field.get_default(call_default_factory=True) for name, field in known}
        return {name for name, value in default.items() if getattr(self, name) != value}


class EngineConfig(_Section):
    """The model, and how it is run."""

    model: str = Field(
        "demo",
        description="Model directory, name on the Hugging Face hub, or 'demo' (included).",
    )
    engine: Literal["native", "scripted", "sim"] = Field(
        "native",
        description="native runs the model with PyTorch; sim makes up tokens at the pace of"
        " --profile; scripted makes them up at a steady pace. The last two need the model's"
        " tokenizer alone.",
    )
    kv_tokens: int | None = Field(
        None, ge=1, description="KV memory in tokens; by default what fits in memory."
    )
    block_size: int = Field(16, ge=1, description="Tokens per KV block.")
    max_batch: int = Field(64, ge=1, description="Most requests in one step.")
    max_step_tokens: int = Field(512, ge=1, description="Most tokens computed in one step.")
    max_request_tokens: int | None = Field(
        None,
        ge=2,
        description="Most prompt plus output tokens; by default the model's.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of weights and KV."
    )
    device: str = Field("auto", description="Where the model runs: auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of an engine; by default PyTorch's choice, or with several"
        " instances a share of the CPUs.",
    )
    prefix_cache: bool = Field(
        True, description="Share the KV of equal prompt beginnings between requests."
    )


class SimConfig(_Section):
    """The machine that ``--engine sim`` stands for."""

    profile: str | None = Field(
        None, description="Step times of the simulated engine: a MODEL/GPU, or a profile's file."
    )
    speed: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="The simulated engine is so many times faster."
    )


class SchedulerConfig(_Section):
    """Which policy decides, and its seed."""

    preset: str = Field("past-future", description="Scheduling preset; see 'penstock presets'.")
    order: (
        Literal[
            "fcfs",
            "priority",
            "shortest-prefill",
            "earliest-deadline",
            "least-laxity",
            "aged-shortest",
            "urgency-literal",
            "urgency",
        ]
        | None
    ) = Field(None, description="Who is considered first, instead of the preset's answer.")
    parameters: dict[str, int | float] = Field(
        default_factory=dict,
        description="Overrides of the preset's parameters, as --parameters.NAME VALUE.",
    )
    seed: int = Field(0, ge=0, description="Seed of the policy's random draws.")


class ClusterConfig(_Section):
    """Several instances behind one address; Ray places and supervises them."""

    instances: int = Field(
        1, ge=1, description="Engines behind this server; 2 or more need 'penstock[ray]'."
    )
    prefill: int = Field(
        0, ge=0, description="Engines for prompts only, instead of --instances; needs --decode."
    )
    decode: int = Field(
        0, ge=0, description="Engines that go on from the KV that the --prefill ones computed."
    )
    kv_transport: Literal["object-store", "inline"] = Field(
        "object-store",
        description="What carries KV from one to another: Ray's object store, or the messages.",
    )
    stream_kv: bool = Field(False, description="KV goes over after each prompt chunk.")
    place: str | None = Field(
        None,
        description="Which instance takes a request, instead of the preset's answer: round-robin,"
        " least-outstanding, power-of-two, max-min or forecast-aware.",
    )
    ray_address: str | None = Field(
        None, description="Ray cluster to join; by default Ray is started on this machine."
    )
    cpus_per_instance: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="CPUs that Ray keeps for each; by default 1."
    )
    gpus_per_instance: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="GPUs that Ray keeps for each."
    )

    @property
    def count(self) -> int:
        """Engines in all."""
        return self.prefill + self.decode or self.instances

    @property
    def roles(self) -> list[Role]:
        """Of each engine; empty if all do everything."""
        return [Role.PREFILL] * self.prefill + [Role.DECODE] * self.decode

    @property
    def flags(self) -> str:
        """The flags that say how many."""
        return "--prefill, --decode" if self.prefill else "--instances"

    @property
    def asked(self) -> str:
        """These flags with what was asked for."""
        if self.prefill:
            return f"--prefill {self.prefill} --decode {self.decode}"
        return f"--instances {self.instances}"


class HttpConfig(_Section):
    """The HTTP edge."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_keys: tuple[str, ...] = Field(
        (), description="Accepted bearer tokens for /v1; none means open to everyone."
    )
    max_body_bytes: int = Field(
        4 << 20, ge=1024, description="Largest request body; longer ones get 413."
    )
    max_header_bytes: int = Field(
        32 << 10, ge=1024, description="Largest request head; longer ones get 431."
    )
    pace_delivery: bool = Field(
        False,
        description="Release tokens no earlier than the pace of their request's TPOT promise.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="After SIGTERM, how long open requests may take to end."
    )


class AdmissionConfig(_Section):
    """Limits of the queue; beyond them requests get 429 with Retry-After."""

    max_waiting: int = Field(
        256, ge=0, description="Most requests that wait for admission; 0 is no limit."
    )
    max_waiting_tokens: int = Field(
        262_144,
        ge=0,
        description="Most prompt tokens of requests that wait for admission; 0 is no limit.",
    )


class BenchConfig(_Section):
    """Hooks that only benchmarks want."""

    trace_lengths: bool = Field(
        False, description="Accept trace_output_tokens in requests: the output ends at that length."
    )
    record_steps: Path | None = Field(
        None,
        description="Add what each step computed and took to this file (several instances: FILE.0,"
        " FILE.1, ...): see 'penstock profile'.",
    )


class SLOClass(_Section):
    """A named SLO: bounds in seconds, and what to do with a request that misses them."""

    ttft: float | None = Field(None, gt=0, description="Arrival to first token.")
    tpot: float | None = Field(None, gt=0, description="Mean time per token after the first.")
    gap: float | None = Field(None, gt=0, description="Largest time between two tokens.")
    e2e: float | None = Field(None, gt=0, description="Arrival to last token.")
    on_miss: OnMiss = Field(
        OnMiss.KEEP, description="keep serves it anyway, demote serves it last, expire gives up."
    )

    @property
    def slo(self) -> SLO:
        """The bounds, as schedulers know them."""
        return SLO(self.ttft, self.tpot, self.gap, self.e2e)


class Config(_Section):
    """Everything that ``penstock serve`` can be told."""

    engine: EngineConfig = EngineConfig()
    sim: SimConfig = SimConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    cluster: ClusterConfig = ClusterConfig()
    http: HttpConfig = HttpConfig()
    admission: AdmissionConfig = AdmissionConfig()
    bench: BenchConfig = BenchConfig()
    slo: dict[str, SLOClass] = Field(default_factory=dict)


Tree: TypeAlias = dict[str, dict[str, Any]]
Sources: TypeAlias = dict[tuple[str, str], str]


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every plain setting: (section, name, declaration).  Names are unique over sections."""
    for section, info in Config.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, _Section):
            for name, field in info.annotation.model_fields.items():
                yield section, name, field


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    slo_classes: Sequence[str] = (),
) -> Config:
    """Merge the sources and check the result.

    Args:
        path: a TOML file.
        environ: environment variables; others than ``PENSTOCK_...`` are left alone.
        flags: values by field name; ``None`` means not given.
        slo_classes: ``name=ttft:0.5,...`` as the flag ``--slo-class`` takes them.

    Raises:
        ConfigError: naming the source, the value and what would be right.
    """
    tree: Tree = {}
    sources: Sources = {}
    if path is not None:
        _merge_file(path, tree, sources)
    _merge_environ(environ or {}, tree, sources)
    for section, name, _ in fields():
        value = (flags or {}).get(name)
        if value is not None:
            tree.setdefault(section, {})[name] = value
            sources[section, name] = "--" + name.replace("_", "-")
    for text in slo_classes:
        name, bounds = _parse_slo_class(text)
        tree.setdefault("slo", {})[name] = bounds
        sources["slo", name] = f"--slo-class {text}"
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error, sources)) from None


def _merge_file(path: Path, tree: Tree, sources: Sources) -> None:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"--config {path}: cannot be read as TOML: {error}"
        raise ConfigError(msg) from None
    for section, values in content.items():
        if section not in Config.model_fields or not isinstance(values, dict):
            known = ", ".join(f"[{name}]" for name in Config.model_fields)
            msg = f"{path}: [{section}] is not a section; it must be one of {known}"
            raise ConfigError(msg)
        for name, value in values.items():
            tree.setdefault(section, {})[name] = value
            sources[section, name] = f"{path}: [{section}] {name}"


def _merge_environ(environ: Mapping[str, str], tree: Tree, sources: Sources) -> None:
    known = {ENV_PREFIX + name.upper(): (section, name) for section, name, _ in fields()}
    for key in sorted(environ):
        if not key.startswith(ENV_PREFIX):
            continue
        if key not in known:
            msg = f"{key} is not a setting of penstock; 'penstock config --help' lists them"
            raise ConfigError(msg)
        section, name = known[key]
        value: object = environ[key]
        if name == "api_keys":
            value = [part for part in environ[key].split(",") if part]
        elif name == "parameters":
            value = dict(part.split("=", 1) for part in environ[key].split(",") if "=" in part)
        tree.setdefault(section, {})[name] = value
        sources[section, name] = key


def _parse_slo_class(text: str) -> tuple[str, dict[str, object]]:
    name, equals, rest = text.partition("=")
    bounds: dict[str, object] = {}
    for part in rest.split(","):
        key, colon, value = part.partition(":")
        if not (name and equals and colon) or key not in (*BOUNDS, "on_miss") or key in bounds:
            msg = f"--slo-class {text!r} cannot be read at {part!r}; it must look like {SLO_FORM}"
            raise ConfigError(msg)
        bounds[key] = value
    return name, bounds


def _describe(error: ValidationError, sources: Sources) -> str:
    lines = []
    for item in error.errors():
        section, name = (*(str(part) for part in item["loc"]), "", "")[:2]
        source = sources.get((section, name), f"[{section}] {name}")
        rest = ".".join(str(part) for part in item["loc"][2:])
        where = f"{source} ({rest})" if rest else source
        lines.append(f"{where}: {item['input']!r} is refused: {_rule(item['msg'])}")
    return "\n".join(lines)


def _rule(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text.replace("Input should be", "it must be")


def to_toml(config: Config) -> str:
    """The effective configuration as TOML, with each field's words; API keys are hidden."""
    lines: list[str] = []
    previous = ""
    for section, name, info in fields():
        if section != previous:
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            previous = section
        value = getattr(getattr(config, section), name)
        if name == "api_keys":
            value = ["(hidden)"] * len(value)
        lines.append(f"# {info.description}")
        lines.append(f"# {name} =" if value is None else f"{name} = {_toml_value(value)}")
    for name, slo_class in config.slo.items():
        lines += ["", f"[slo.{_toml_key(name)}]"]
        for key, value in slo_class.model_dump(mode="json", exclude_none=True).items():
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else _toml_value(name)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
