"""Step times from a profile of a model's layers, as LLMServingSim publishes them.

Problem: the kernels of a step depend on it in ways no formula catches: a mixed step's attention
takes up to twice what its prompt and its decoding requests take apart.
Source: the profiler of casys-kaist/LLMServingSim: microseconds of each layer against tokens in
the step, of attention against (prompt chunk, its context, decoding requests, their mean context),
of a mixture of experts against (tokens, distinct experts that they activate on this GPU), and of
the head and the sampler against sequences.
Rule: ``host + sum over layers``, each interpolated linearly between measured points, axis by axis;
beyond the last point along the line through the last two.  Several prompt chunks in one step count
as equal ones: the first beside the decoding requests, the others alone.  Tokens that each pick
``k`` of ``E`` experts evenly activate ``E * (1 - (1 - k/E) ** tokens)`` of them on average.
Limits: lengths within a batch count by their mean; what no kernel shows is in two numbers to be
calibrated: ``host`` per step, and ``link`` per token, for the all-reduce of tensor parallelism.
Routing is taken as even over experts, tokens and GPUs: real routing is skewed, so a step activates
fewer experts and waits for the GPU that has most to do.  What expert parallelism sends is in
``link`` at best.  Spread over more GPUs than a token picks experts, a GPU's share is below the 1
that its table starts with.  All layers are alike: tables with an MLP and experts are refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import polars as pl

from penstock.core.forecast.latency.base import StepLoad

_ONCE = frozenset({"embedding", "final_layernorm"})
# Before attention and before the MLP.
_TWICE = frozenset({"layernorm"})
_MICRO = 1e-6
# Of attention, in later versions of the profiler: the kernel, and tokens per decoding request.
_OPTIONAL = ("layer", "decode_q_len")
# As the profiler names the parts of an MLP, and those of an attention block.
_MLP = ("gate_up_proj", "act_fn", "down_proj")
_BLOCK = frozenset({"layernorm", "qkv_proj", "qk_norm", "rotary_emb", "o_proj"})

_Row = TypeVar("_Row")
Curve: TypeAlias = tuple[list[float], list[float]]
"""Ascending places, and values there."""


class TableError(ValueError):
    """A layer table that cannot be read; names the file, and the row and column if there is one."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Measured attention of one layer, in microseconds.

    Attributes:
        decode: by decoding requests, against their mean context.
        prefill: by tokens of a prompt chunk, against its context.
        mixed: by tokens of a prompt chunk, its context and decoding requests, against the latter's
            mean context; may be empty.
    """

    decode: Mapping[float, Curve]
    prefill: Mapping[float, Curve]
    mixed: Mapping[float, Mapping[float, Mapping[float, Curve]]]

    def decoding(self, requests: float, mean: float) -> float:
        """Decoding requests alone."""
        return _across(self.decode, requests, lambda curve: _at(curve, mean))

    def chunk(self, tokens: float, context: float) -> float:
        """A prompt chunk alone."""
        return _across(self.prefill, tokens, lambda curve: _at(curve, context))

    def mixed_step(self, tokens: float, context: float, requests: float, mean: float) -> float:
        """A prompt chunk beside decoding requests."""
        if not self.mixed:
            return self.chunk(tokens, context) + self.decoding(requests, mean)
        return _across(
            self.mixed, tokens,
            lambda by_context: _across(
                by_context, context,
                lambda by_requests: _across(
                    by_requests, requests, lambda curve: _at(curve, mean)
                ),
            ),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Experts:
    """Measured mixture of experts of one layer on one GPU, in microseconds.

    Attributes:
        times: by tokens in the step, against the distinct experts that they activate.
        each: experts that one token activates.
        count: experts that there are.
    """

    times: Mapping[float, Curve]
    each: float
    count: float

    def activated(self, tokens: float) -> float:
        """Distinct experts that so many tokens activate, on average and with even routing."""
        missed: float = (1 - self.each / self.count) ** tokens
        return self.count * (1 - missed)

    def step(self, tokens: float) -> float:
        """A step of so many tokens."""
        # T tokens are measured with k * T experts at most, and a few more activate more than that.
        # Left out one by one, 4, 8 and 16 tokens in LLMServingSim's tables of three models come
        # out 14 to 31 % too short if cut off there, -5 to +11 % along the line.
        activated = self.activated(tokens)
        return _across(self.times, tokens, lambda curve: _at(curve, activated))


@dataclass(frozen=True, slots=True)
class LayerTable:
    """A model's kernels, in microseconds, and the time a step takes beyond them.

    Attributes:
        dense: of one layer's kernels but attention and experts, against tokens.
        once: of those that run once per step, against tokens.
        per_sequence: of head and sampler, against sequences.
        attention: of one layer.
        layers: of the model.
        host: seconds per step beyond the kernels; negative where kernels overlap, or were
            profiled with gaps that a server has not.
        link: seconds per token beyond the kernels.
        experts: of one layer; None if the model has no mixtures of experts.
    """

    dense: Curve
    once: Curve
    per_sequence: Curve
    attention: Attention
    layers: int
    host: float = 0.0
    link: float = 0.0
    experts: Experts | None = None

    wants_longest = False

    @property
    def least_host(self) -> float:
        """Half of the smallest step may be host time that is not there, no more."""
        return -replace(self, host=0.0, link=0.0).seconds(StepLoad(1, 1)) / 2

    def with_host(self, seconds: float) -> LayerTable:
        """The same with another time per step."""
        return replace(self, host=seconds)

    def with_link(self, seconds: float) -> LayerTable:
        """The same with another time per token."""
        return replace(self, link=seconds)

    def seconds(self, load: StepLoad) -> float:
        """Host, link and kernels."""
        tokens = load.prefill + load.decoding
        each = _at(self.dense, tokens) + self._attention(load)
        if self.experts is not None:
            each += self.experts.step(tokens)
        once = _at(self.once, tokens) + _at(self.per_sequence, load.decoding + load.chunks)
        return self.host + self.link * tokens + _MICRO * (self.layers * each + once)

    def decode_line(self, decoding: int) -> None:
        """Interpolated between points, so not affine in the context."""
        del decoding

    def _attention(self, load: StepLoad) -> float:
        mean = load.context / load.decoding if load.decoding else 0.0
        if not load.prefill:
            return self.attention.decoding(load.decoding, mean)
        chunks = max(1, load.chunks)
        chunk = load.prefill / chunks
        context = max(0.0, load.prefill_work / load.prefill - chunk / 2)
        alone = self.attention.chunk(chunk, context)
        if not load.decoding:
            return chunks * alone
        first = self.attention.mixed_step(chunk, context, load.decoding, mean)
        return first + (chunks - 1) * alone


def read_layer_table(prefix: str, layers: int, expert_parallel: int = 1) -> LayerTable:
    """Read ``PREFIX_dense``, ``_attention`` and ``_per_sequence``, each ``.csv.gz`` or ``.csv``.

    ``PREFIX_moe`` is read too if it is there.

    Args:
        prefix: path up to the names' last parts.
        layers: of the model, which the tables do not say.
        expert_parallel: GPUs that the experts are spread over; 1 if every GPU has a part of each
            expert, which must then be so in the table too.

    Raises:
        TableError: a file is missing or cannot be used.
    """
    unknown = _find(prefix, "linear_attention")
    if unknown is not None:
        msg = f"{unknown}: linear attention cannot be modelled from tables of layers"
        raise TableError(msg)
    dense = _read(prefix, "dense", ("layer", "tokens"))
    sequences = _read(prefix, "per_sequence", ("layer", "sequences"))
    axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    attention = _one_kernel(_read(prefix, "attention", axes, _OPTIONAL), f"{prefix}_attention")
    moe = _find(prefix, "moe")
    _one_kind(dense, prefix, moe)
    return LayerTable(
        dense=_sum(dense, "tokens", lambda layer: 0 if layer in _ONCE else 1 + (layer in _TWICE)),
        once=_sum(dense, "tokens", lambda layer: int(layer in _ONCE)),
        per_sequence=_sum(sequences, "sequences", lambda _: 1),
        attention=_attention(attention, axes, prefix),
        layers=layers,
        experts=None if moe is None else _experts(prefix, moe, expert_parallel),
    )


def _find(prefix: str, part: str) -> Path | None:
    paths = (Path(f"{prefix}_{part}{suffix}") for suffix in (".csv.gz", ".csv"))
    return next((path for path in paths if path.is_file()), None)


def _read(
    prefix: str, part: str, keys: Sequence[str], optional: Sequence[str] = ()
) -> pl.DataFrame:
    path = _find(prefix, part)
    if path is None:
        msg = f"{prefix}_{part}.csv.gz: there is no such file"
        raise TableError(msg)
    try:
        frame = pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        msg = f"{path}: cannot be read: {error}"
        raise TableError(msg) from error
    wanted = [*keys, "time_us"]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        msg = f"{path}: has the columns {', '.join(frame.columns)}; {missing[0]} is missing"
        raise TableError(msg)
    if not frame.height:
        msg = f"{path}: has no rows"
        raise TableError(msg)
    wanted += [name for name in optional if name in frame.columns]
    for name in wanted:
        if name != "layer":
            frame = _as_numbers(frame, name, path)
    return frame.select(wanted)


def _one_kernel(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """The rows of attention proper, with one token per decoding request."""
    if "decode_q_len" in frame.columns:
        frame = frame.filter(pl.col("decode_q_len") <= 1)
        if not frame.height:
            msg = f"{name}: has no rows with a decode_q_len of 1"
            raise TableError(msg)
    kernels = frame["layer"].unique().sort().to_list() if "layer" in frame.columns else []
    if len(kernels) > 1:
        msg = (
            f"{name}: has the kernels {', '.join(map(str, kernels))}; which layers run which of "
            "them is not in the table, so there must be one"
        )
        raise TableError(msg)
    return frame


def _one_kind(dense: pl.DataFrame, prefix: str, moe: Path | None) -> None:
    """Refuse tables that do not say what follows attention in which layer."""
    names = set(dense["layer"].to_list())
    found = [name for name in _MLP if name in names]
    if moe is not None and found:
        msg = (
            f"{prefix}_dense: column 'layer' has {', '.join(found)} of an MLP, and there is {moe} "
            "of experts; which layers have which is not in the tables, so there must be one"
        )
        raise TableError(msg)
    if moe is None and "o_proj" in names and names <= _ONCE | _BLOCK:
        msg = (
            f"{prefix}_dense: column 'layer' has none of {', '.join(_MLP)}; "
            f"a model without an MLP needs {prefix}_moe.csv.gz"
        )
        raise TableError(msg)


def _as_numbers(frame: pl.DataFrame, name: str, path: Path) -> pl.DataFrame:
    numbers = frame[name].cast(pl.Float64, strict=False)
    bad = (numbers.is_null() | ~numbers.is_finite() | (numbers < 0)).fill_null(value=True)
    if bad.any():
        row = int(bad.arg_max() or 0)
        msg = (
            f"{path}: line {row + 2}, column {name!r} is {frame[name][row]!r}; "
            "it must be a number of 0 or more"
        )
        raise TableError(msg)
    return frame.with_columns(numbers.alias(name))


def _sum(frame: pl.DataFrame, place: str, weight: Callable[[str], int]) -> Curve:
    """The layers' times added up, each as often as ``weight`` says, where any was measured."""
    curves = []
    for (layer,), rows in frame.group_by("layer", maintain_order=True):
        times = weight(str(layer))
        if times:
            rows = rows.group_by(place).agg(pl.col("time_us").mean()).sort(place)  # noqa: PLW2901
            curves.append((times, (rows[place].to_list(), rows["time_us"].to_list())))
    places = sorted(set(frame[place].to_list()))
    return places, [sum(n * _at(curve, at) for n, curve in curves) for at in places]


def _experts(prefix: str, path: Path, parallel: int) -> Experts:
    place = "activated_experts"
    frame = _read(prefix, "moe", ("ep", "tokens", place))
    rows = frame.filter(pl.col("ep") == parallel)
    if not rows.height:
        known = ", ".join(f"{ep:g}" for ep in frame["ep"].unique().sort())
        msg = (
            f"{path}: column 'ep' has {known}; it must have {parallel}, "
            "the GPUs that the experts are spread over"
        )
        raise TableError(msg)
    times: dict[float, Curve] = {}
    rows = rows.group_by("tokens", place).agg(pl.col("time_us").mean()).sort("tokens", place)
    for tokens, activated, time in rows.iter_rows():
        curve = times.setdefault(tokens, ([], []))
        curve[0].append(activated)
        curve[1].append(time)
    least, most = (float(at) for at in (min(rows[place]), max(rows[place])))
    if least < 1:
        msg = f"{path}: column {place!r} has {least:g}; a token activates 1 or more"
        raise TableError(msg)
    return Experts(times, least, most)


def _attention(frame: pl.DataFrame, axes: Sequence[str], prefix: str) -> Attention:
    decode: dict[float, Curve] = {}
    prefill: dict[float, Curve] = {}
    mixed: dict[float, dict[float, dict[float, Curve]]] = {}
    # Sorted, so that every axis ascends; of rows that repeat, the mean counts.
    rows = frame.group_by(axes).agg(pl.col("time_us").mean()).sort(axes)
    for chunk, context, requests, mean, time in rows.iter_rows():
        if requests and not chunk:
            curve, place = decode.setdefault(requests, ([], [])), mean
        elif chunk and not requests:
            curve, place = prefill.setdefault(chunk, ([], [])), context
        else:
            by_requests = mixed.setdefault(chunk, {}).setdefault(context, {})
            curve, place = by_requests.setdefault(requests, ([], [])), mean
        curve[0].append(place)
        curve[1].append(time)
    for name, part in (("decoding requests alone", decode), ("a prompt chunk alone", prefill)):
        if not part:
            msg = f"{prefix}_attention: has no rows of {name}"
            raise TableError(msg)
    return Attention(decode, prefill, mixed)


def _at(curve: Curve, place: float) -> float:
    places, values = curve
    return _between(places, place, lambda at: values[bisect_right(places, at) - 1])


def _across(table: Mapping[float, _Row], place: float, value: Callable[[_Row], float]) -> float:
    return _between(list(table), place, lambda at: value(table[at]))


def _between(places: Sequence[float], place: float, value: Callable[[float], float]) -> float:
    """Linear between the two neighbours, and beyond the last; below the first, its value."""
    if len(places) == 1 or place <= places[0]:
        return value(places[0])
    right = min(bisect_right(places, place), len(places) - 1)
    low, high = places[right - 1], places[right]
    if place == low:
        return value(low)
    from_, to = value(low), value(high)
    return max(0.0, from_ + (to - from_) * (place - low) / (high - low))
