"""What can be set: each field with its type, range, default and words.

:mod:`penstock.config` reads them from a file, the environment and flags; the words are their
documentation and their command-line help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from penstock.core.types import SLO, OnMiss, Role


class Section(BaseModel):
    """Fields that go together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def changed(self) -> set[str]:
        """Names of the fields that say something else than their default.

        Whether a field was given is not asked: what ``penstock config`` prints gives them all.
        """
        known = type(self).model_fields.items()
        default = {name: field.get_default(call_default_factory=True) for name, field in known}
        return {name for name, value in default.items() if getattr(self, name) != value}


class EngineConfig(Section):
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
    swap_tokens: int = Field(
        0,
        ge=0,
        description="Tokens of evicted requests' KV kept in host memory, to go on from; the others"
        " recompute.",
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


class SimConfig(Section):
    """The machine that ``--engine sim`` stands for."""

    profile: str | None = Field(
        None, description="Step times of the simulated engine: a MODEL/GPU, or a profile's file."
    )
    speed: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="The simulated engine is so many times faster."
    )


class SchedulerConfig(Section):
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


class ClusterConfig(Section):
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
    kv_transport: Literal["object-store", "inline", "nixl"] = Field(
        "object-store",
        description="What carries KV from one to another: Ray's object store, the messages, or"
        " NIXL, from device to device ('penstock[nixl]').",
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


def _key(key: str) -> str:
    # What a header can carry; and an empty one would let everyone in.
    if not key or not all("!" <= character <= "~" for character in key):
        msg = "a key must be one or more visible ASCII characters, without spaces"
        raise ValueError(msg)
    return key


class HttpConfig(Section):
    """The HTTP edge."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_keys: tuple[Annotated[str, AfterValidator(_key)], ...] = Field(
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
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="After SIGTERM, how long open requests may take to end.",
    )


class AdmissionConfig(Section):
    """Limits of the queue; beyond them requests get 429 with Retry-After."""

    max_waiting: int = Field(
        256, ge=0, description="Most requests that wait for admission; 0 is no limit."
    )
    max_waiting_tokens: int = Field(
        262_144,
        ge=0,
        description="Most prompt tokens of requests that wait for admission; 0 is no limit.",
    )


class BenchConfig(Section):
    """Hooks that only benchmarks want."""

    trace_lengths: bool = Field(
        False, description="Accept trace_output_tokens in requests: the output ends at that length."
    )
    record_steps: Path | None = Field(
        None,
        description="Add what each step computed and took to this file (several instances: FILE.0,"
        " FILE.1, ...): see 'penstock profile'.",
    )


_Bound: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class SLOClass(Section):
    """A named SLO: bounds in seconds, and what to do with a request that misses them."""

    ttft: _Bound = Field(None, description="Arrival to first token.")
    tpot: _Bound = Field(None, description="Mean time per token after the first.")
    gap: _Bound = Field(None, description="Largest time between two tokens.")
    e2e: _Bound = Field(None, description="Arrival to last token.")
    on_miss: OnMiss = Field(
        OnMiss.KEEP, description="keep serves it anyway, demote serves it last, expire gives up."
    )

    @property
    def slo(self) -> SLO:
        """The bounds, as schedulers know them."""
        return SLO(self.ttft, self.tpot, self.gap, self.e2e)


class Config(Section):
    """Everything that ``penstock serve`` can be told."""

    engine: EngineConfig = EngineConfig()
    sim: SimConfig = SimConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    cluster: ClusterConfig = ClusterConfig()
    http: HttpConfig = HttpConfig()
    admission: AdmissionConfig = AdmissionConfig()
    bench: BenchConfig = BenchConfig()
    slo: dict[str, SLOClass] = Field(default_factory=dict)
