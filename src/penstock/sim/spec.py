"""One simulated run as data: everything that decides its outcome, and what came of it.

A specification is plain data, so it crosses process boundaries, is written next to its result,
and has a content hash by which a sweep knows what it has done already.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from penstock import __version__
from penstock.bench.command import LoadOptions, WorkloadOptions, build_workload
from penstock.bench.traces import SORTED
from penstock.bench.workload import Workload, parse_slo
from penstock.core.forecast.latency.affine import DecodeSteps
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.policies.fleets import FLEETS
from penstock.core.types import Capabilities, OnMiss
from penstock.sim import profiles
from penstock.sim.fit import misfit, too_short
from penstock.sim.fleet import Disaggregated, fleet_of
from penstock.sim.link import Link
from penstock.sim.prefixes import check_prefixes, prefixes_of
from penstock.sim.run import Job
from penstock.sim.study import study_policy

_MOST_BATCH = 1024
_ALL = 10**9  # more clients than requests: all of them wait from the start


class SpecError(ValueError):
    """A specification that cannot be simulated; names the field."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to simulate.

    Attributes:
        preset: the policy, one of ``penstock presets``; ``parameters`` override its own.
        trace, lengths, input, output: lengths, as ``penstock bench`` takes them (one source).
        trace_digest: of the trace file's content; another content is refused.
        scale: factor on all lengths, at most 1.
        requests: how many; None is all of a trace, else 200.
        clients: closed loop with so many clients; else the loop is open.
        retries: closed loop: how often a request that failed or missed its SLO goes back to the
            end of the queue.
        rate: requests per second.
        arrivals: poisson, gamma:CV, or trace for the trace's own times.
        speed: the times are divided by this.
        slo: bounds in seconds, ``[NAME[*WEIGHT]:]ttft=2,gap=0.5``.
        cap: what policies are told of output lengths; None is the longest output.
        kv_tokens, block_size: KV memory in tokens, and tokens per block.
        prefix_cache: blocks that the trace's requests have in common are computed once; needs a
            trace with ``hash_ids`` whose blocks are whole blocks here.
        swap_tokens: tokens of evicted requests whose KV is kept in host memory.
        swap_bandwidth: of the bus to it, in bytes per second.
        max_batch: most requests in a step; None is as many as the budget has tokens, at most 1024.
        prefill_budget: most tokens in a step, at least ``max_batch``.
        plan_every: steps from one admission pass to the next; None is the preset's.
        profile: name of the step-time profile.
        steps_only: no profile: a decode step is one second, prefill takes no time, and the cap
            does not cut outputs.
        instances: machines of this kind.  Requests go to them in turn, unless ``place`` or a
            preset with slices says otherwise.
        place: how requests are placed on instances; None: in turn, or as the preset does it.
        padded: instances run static batches as rectangles; for presets with static batches.
        prefill, decode: instances for prompts, and for all that follows, instead of ``instances``.
        kv_bytes_per_token: what the KV of a token weighs on its way to another instance or to host
            memory.
        link_bandwidth: of the link into a decode instance, in bytes per second.
        link_latency: of a transfer, in seconds.
        stream_kv: KV crosses after each prompt chunk instead of at the end of the prefill.
        back_pressure: prompts wait while the forecast KV of all that they lead to is above so many
            times the decode instances' memory; None: never.
        seed: of lengths, arrivals, classes and the policy's draws; at least 0.
    """

    preset: str
    parameters: dict[str, float | None] = {}
    trace: str | None = None
    trace_digest: str | None = None
    lengths: str | None = None
    input: str | None = None
    output: str | None = None
    scale: float = 1.0
    requests: int | None = None
    clients: int | None = None
    retries: int = 0
    rate: float | None = None
    arrivals: str | None = None
    speed: float = 1.0
    slo: tuple[str, ...] = ()
    cap: int | None = None
    kv_tokens: int
    block_size: int = 1
    prefix_cache: bool = False
    swap_tokens: int = 0
    swap_bandwidth: float = 25e9
    max_batch: int | None = None
    prefill_budget: int = 2048
    plan_every: int | None = None
    profile: str | None = None
    steps_only: bool = False
    instances: int = 1
    place: str | None = None
    padded: bool = False
    prefill: int = 0
    decode: int = 0
    kv_bytes_per_token: int = 131_072
    link_bandwidth: float = 50e9
    link_latency: float = 1e-3
    stream_kv: bool = False
    back_pressure: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.profile is None) != self.steps_only:
            msg = f"profile is {self.profile!r}; give a profile, or steps_only without one"
            raise SpecError(msg)
        self._check_numbers()
        if self.block_size > self.kv_tokens:
            msg = f"block_size is {self.block_size}; it must be at most kv_tokens"
            msg += f" ({self.kv_tokens}): a block is whole"
            raise SpecError(msg)
        if self.batch > self.prefill_budget:
            msg = f"max_batch is {self.max_batch}; it must be at most prefill_budget"
            msg += f" ({self.prefill_budget}): every running request needs a token in a step"
            raise SpecError(msg)
        if self.retries < 0 or (self.retries and self.clients is None):
            msg = f"retries is {self.retries}; it must be at least 0, and 0 in an open loop"
            raise SpecError(msg)
        if self.instances > 1 and self.clients is not None and not self.pooled:
            msg = f"instances is {self.instances}; without a place, several need an open loop"
            raise SpecError(msg)
        if self.pooled and self.steps_only:
            msg = f"preset {self.preset} with place {self.place} needs a profile, not steps_only"
            raise SpecError(msg)
        if self.steps_only and self.prefix_cache:
            msg = "prefix_cache is true; steps_only counts every request's tokens as its own"
            raise SpecError(msg)
        self._check_roles()
        static = self.preset == "sls" or (
            self.preset in FLEETS and FLEETS[self.preset].instance == "sls"
        )
        if self.padded and not (self.pooled and static):
            msg = "padded is for static batches: scls presets, and sls with a place; this is "
            raise SpecError(msg + self.policy_name)

    def _check_numbers(self) -> None:
        """Refuse a number that is out of range by itself."""
        ones = ("kv_tokens", "block_size", "max_batch", "prefill_budget", "instances", "clients")
        least = {"swap_tokens": 0, "seed": 0, "cap": 1} | dict.fromkeys(ones, 1)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                msg = f"{name} is {value}; it must be at least {bound}"
                raise SpecError(msg)
        for name in ("rate", "speed"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                msg = f"{name} is {value}; it must be a finite number above 0"
                raise SpecError(msg)

    def _check_roles(self) -> None:
        if self.prefill < 0 or self.decode < 0 or (self.prefill > 0) != (self.decode > 0):
            msg = f"prefill is {self.prefill} and decode is {self.decode}; each needs the other"
            raise SpecError(msg)
        if self.back_pressure is not None and not self.prefill:
            msg = f"back_pressure is {self.back_pressure}; it needs prefill and decode instances"
            raise SpecError(msg)
        if self.stream_kv and not self.prefill:
            msg = "stream_kv is true; it needs prefill and decode instances"
            raise SpecError(msg)
        if not self.prefill:
            return
        if self.instances > 1:
            msg = f"instances is {self.instances}; it goes without prefill and decode"
            raise SpecError(msg)
        if self.preset in FLEETS:
            msg = f"preset {self.preset} has slices; it runs on instances without roles"
            raise SpecError(msg)

    @property
    def pooled(self) -> bool:
        """Whether a dispatcher stands before the instances."""
        return self.place is not None or self.preset in FLEETS or self.prefill > 0

    @property
    def batch(self) -> int:
        """Most requests in a step."""
        return min(_MOST_BATCH, self.prefill_budget) if self.max_batch is None else self.max_batch

    @property
    def machines(self) -> int | Disaggregated:
        """How many instances, or how many for what."""
        if not self.prefill:
            return self.instances
        link = Link(self.kv_bytes_per_token, self.link_bandwidth, self.link_latency)
        return Disaggregated(self.prefill, self.decode, link, self.back_pressure, self.stream_kv)

    @property
    def bus(self) -> Link | None:
        """To host memory."""
        steps, tokens = self.steps_only, self.swap_tokens
        return Link(self.kv_bytes_per_token, self.swap_bandwidth) if tokens and not steps else None

    @property
    def load(self) -> float:
        """Clients, requests per second, or the speed at which a trace is replayed."""
        if self.clients is not None:
            return self.clients
        return self.speed if self.rate is None else self.rate * self.speed

    @property
    def load_unit(self) -> str:
        """The unit of :attr:`load`."""
        if self.clients is not None:
            return "clients"
        return "x trace speed" if self.rate is None else "req/s"

    @property
    def policy_name(self) -> str:
        """The preset and what differs from its defaults."""
        changes = [f"{key}={_plain(value)}" for key, value in self.parameters.items()]
        return ":".join((self.preset, *changes))

    def key(self) -> str:
        """Content hash: equal for equal runs of this version of Penstock."""
        text = msgspec.json.encode([__version__, self], order="deterministic")
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def workload_of(spec: RunSpec) -> Workload:
    """Its requests, with classes and, in an open loop, arrival times.

    Raises:
        ValueError: options that cannot be used, or a request that can never fit.
        OSError: the trace cannot be read.
    """
    if spec.trace is not None and spec.trace_digest not in {None, digest_of(Path(spec.trace))}:
        msg = f"trace {spec.trace} has changed since the specification was written"
        raise SpecError(msg)
    options = WorkloadOptions(
        trace=None if spec.trace is None else Path(spec.trace),
        lengths=spec.lengths,
        input=spec.input,
        output=spec.output,
        scale=spec.scale,
        requests=spec.requests,
        seed=spec.seed,
    )
    load = LoadOptions(clients=spec.clients, rate=spec.rate, arrivals=spec.arrivals)
    made = build_workload(options, load).with_classes(parse_slo(spec.slo), spec.seed)
    return checked_workload(spec, made)


def checked_workload(spec: RunSpec, made: Workload) -> Workload:
    """A workload that can be simulated, with a note on the outputs that its cap cuts.

    Raises:
        SpecError: no requests or no output lengths, a length below 1, a trace out of order, or a
            request that can never fit.
    """
    _check_workload(spec, made)
    if spec.cap is None or spec.steps_only or made.output is None:
        return made
    cut = int((made.output > spec.cap).sum())
    note = f"{cut} outputs cut at the cap of {spec.cap}"
    return replace(made, notes=(*made.notes, note)) if cut else made


def _check_workload(spec: RunSpec, made: Workload) -> None:
    if not len(made):
        msg = f"{made.source}: the workload has 0 requests; it must have at least 1"
        raise SpecError(msg)
    if made.output is None:
        msg = "output is 'model'; a simulation needs output lengths"
        raise SpecError(msg)
    for note in made.notes:
        if note.startswith(SORTED):
            file = spec.trace if made.origin is None else made.origin.path
            msg = f"{file}: rows are not in order of time: {note.removeprefix(SORTED)[2:]}"
            raise SpecError(msg)
    short = too_short(made)
    if short is not None:
        raise SpecError(short)
    if spec.prefix_cache:
        check_prefixes(made, spec.block_size, spec.scale)
    room = min(spec.kv_tokens, capabilities_of(spec).kv_tokens)
    large = misfit(made, room, spec.cap, enforce_cap=not spec.steps_only)
    if large is not None:
        raise SpecError(large)


def default_loop(
    requests: int | None, *, traced: bool, steps_only: bool
) -> tuple[int | None, str | None]:
    """(clients, arrivals) where nobody said how requests come.

    In steps all wait from the start; a trace has its own times.
    """
    if steps_only:
        return requests or _ALL, None
    return None, "trace" if traced else None


def cap_of(spec: RunSpec, workload: Workload) -> int:
    """What policies are told of output lengths."""
    assert workload.output is not None
    return spec.cap or int(workload.output.max())


def jobs_of(spec: RunSpec, workload: Workload) -> list[Job]:
    """The requests as the simulator takes them."""
    assert workload.output is not None
    cap = cap_of(spec, workload)
    count = len(workload)
    times = [0.0] * count if workload.arrival is None else (workload.arrival / spec.speed).tolist()
    rows = zip(times, workload.prompt.tolist(), workload.output.tolist(), strict=True)
    classes = [workload.slo_class(index) for index in range(count)]
    prefixes = prefixes_of(workload, spec.block_size) if spec.prefix_cache else [()] * count
    return [
        Job(str(i), *row, cap, classes[i].slo, classes[i].name, OnMiss.KEEP, 0, prefixes[i], i)
        for i, row in enumerate(rows)
    ]


def capabilities_of(spec: RunSpec) -> Capabilities:
    """The machine that is simulated."""
    return Capabilities(
        kv_blocks=spec.kv_tokens // spec.block_size,
        block_size=spec.block_size,
        max_batch=spec.batch,
        max_step_tokens=spec.prefill_budget,
        max_request_tokens=spec.kv_tokens + 1,
        prefix_cache=spec.prefix_cache,
        swap_tokens=spec.swap_tokens,
    )


def policy_of(spec: RunSpec, instance: int = 0) -> Policy:
    """Its policy, fresh; of one instance, where several run without a dispatcher.

    Raises:
        ValueError: an unknown preset or place, or a parameter that the preset does not have or
            cannot take.
    """
    parameters: dict[str, Any] = dict(spec.parameters)
    for name in presets.OPTIONS.intersection(parameters):
        msg = f"parameters has {name!r}, which is no parameter of a preset"
        raise SpecError(msg)
    if spec.preset not in presets.PRESETS and spec.preset not in FLEETS:
        known = ", ".join((*presets.PRESETS, *FLEETS))
        msg = f"preset {spec.preset!r} is unknown; known are: {known}"
        raise SpecError(msg)
    if spec.pooled:
        fleet = fleet_of(spec.preset, spec.place, spec.seed, spec.parameters)
        options: dict[str, Any] = dict(fleet.parameters)
        return presets.build(fleet.preset, seed=spec.seed, period=spec.plan_every, **options)
    if presets.PRESETS[spec.preset].pack == "slack-literal":
        parameters["profile"] = latency_model(spec)
    # Each instance draws for itself.
    seed = spec.seed if instance == 0 else (spec.seed << 16) + instance
    build = study_policy if spec.steps_only else presets.build
    return build(spec.preset, seed=seed, period=spec.plan_every, **parameters)


def latency_model(spec: RunSpec) -> LatencyModel:
    """Its step times.

    Raises:
        ValueError: there is no such profile.
    """
    if spec.profile is None:
        return DecodeSteps()
    return profiles.load(spec.profile)


def digest_of(path: Path) -> str:
    """Digest of a file's content."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _plain(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
