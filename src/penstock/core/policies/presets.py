"""Named compositions of the five answers.  Each paper is a point in one space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.forecast.prompt_time import LengthAware, PromptTime, RunningRate
from penstock.core.policies.admit.aggressive import Aggressive
from penstock.core.policies.admit.capped import Capped
from penstock.core.policies.admit.conservative import Conservative
from penstock.core.policies.admit.learned_reserve import LearnedReserve
from penstock.core.policies.admit.oracle import Oracle
from penstock.core.policies.admit.past_future import PastFuture
from penstock.core.policies.admit.static import Static
from penstock.core.policies.base import (
    AdmitPolicy,
    OrderPolicy,
    PackPolicy,
    Policy,
    RankPolicy,
    SharePolicy,
)
from penstock.core.policies.order.batch import InBatches
from penstock.core.policies.order.fcfs import Fcfs
from penstock.core.policies.order.priority import Priority
from penstock.core.policies.order.ranks import (
    AgedShortest,
    EarliestDeadline,
    LeastLaxity,
    ShortestPrefill,
)
from penstock.core.policies.order.urgency import Urgency
from penstock.core.policies.order.urgency_literal import UrgencyLiteral
from penstock.core.policies.pack.slack import Slack
from penstock.core.policies.pack.slack_literal import SlackLiteral, step_table
from penstock.core.policies.share.continuous import Continuous
from penstock.core.policies.share.static import StaticShare
from penstock.core.policies.victim.latest_arrived import LatestArrived

AdmitFactory = Callable[..., AdmitPolicy]
_T = TypeVar("_T")
_OPTIONAL = frozenset({"cold_start"})
ORDERS: Mapping[str, Callable[[], OrderPolicy]] = MappingProxyType(
    {"fcfs": Fcfs, "priority": Priority, "batch": InBatches}
)
"""Orders that keep their places, by name."""
RANKS: Mapping[str, Callable[..., RankPolicy]] = MappingProxyType(
    {
        "shortest-prefill": ShortestPrefill,
        "earliest-deadline": EarliestDeadline,
        "least-laxity": LeastLaxity,
        "aged-shortest": AgedShortest,
        "urgency-literal": UrgencyLiteral,
        "urgency": Urgency,
    }
)
"""Orders that are made anew before every step, by name."""
PACKS = ("slack-literal", "slack")
"""Answers to which decoding requests advance; without one of them, all do."""

_RANK_PARAMETERS = ("length_aware", "lost_share")
_PACK_PARAMETERS = ("tpot", "margin", "stretch")


def _without_rng(make: Callable[..., AdmitPolicy]) -> AdmitFactory:
    def build(rng: np.random.Generator, **parameters: Any) -> AdmitPolicy:
        del rng
        return make(**parameters)

    return build


@dataclass(frozen=True, slots=True)
class Preset:
    """A named composition.

    Attributes:
        name: what to write after ``--preset``.
        source: where it comes from.
        admit_name: the name of its answer to "admit".
        admit: makes that answer from a random source and parameters.
        parameters: the defaults of what may be overridden by name, in :func:`build`.
        period, per_pass: see :class:`~penstock.core.policies.base.Policy`.
        order: one of :data:`ORDERS` or :data:`RANKS`.
        pack: one of :data:`PACKS`, or none.
    """

    name: str
    source: str
    admit_name: str
    admit: AdmitFactory
    parameters: Mapping[str, float | int | None]
    period: int = 1
    per_pass: int = 0
    order: str = "fcfs"
    share: str = "continuous"
    victim: str = "latest-arrived"
    pack: str = ""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "vllm",
                "vLLM V1: watermark, chunked prefill, preemption by recompute",
                "aggressive",
                _without_rng(Aggressive),
                MappingProxyType({"watermark": 0.99}),
            ),
            Preset(
                "tgi",
                "text-generation-inference: every request's cap is reserved",
                "conservative",
                _without_rng(Conservative),
                MappingProxyType({"over_commit": 1.0}),
            ),
            Preset(
                "past-future",
                "Past-Future (arXiv 2507.10150): the paper's parameters",
                "past-future",
                PastFuture,
                MappingProxyType({"window": 1000, "reserve": 0.03, "cold_start": None}),
            ),
            Preset(
                "past-future-artifact",
                "Past-Future: the parameters of the authors' artifact server",
                "past-future",
                partial(PastFuture, holds=2),
                MappingProxyType({"window": 40, "reserve": 0.05, "cold_start": 6000}),
                period=2,
                per_pass=1,
            ),
            Preset(
                "past-future-adaptive",
                "Past-Future with a reserve that is learned from evictions",
                "learned-reserve",
                LearnedReserve,
                MappingProxyType(
                    {"window": 1000, "reserve": 0.03, "cold_start": None, "evictions": 0.005}
                ),
            ),
            Preset(
                "oracle",
                "the Past-Future paper's theoretical optimum; needs the true lengths",
                "oracle",
                _without_rng(Oracle),
                MappingProxyType({}),
            ),
            Preset(
                "sls",
                "sequence-level scheduling, SCLS's baseline (arXiv 2406.13511): static batches",
                "static",
                _without_rng(Static),
                MappingProxyType({"batch_size": 16}),
                order="batch",
                share="static",
            ),
            Preset(
                "ils",
                "iteration-level scheduling, SCLS's baseline (arXiv 2406.13511): "
                "continuous batches with a cap on parallel requests",
                "capped",
                _without_rng(Capped),
                MappingProxyType({"parallel": 16}),
            ),
            Preset(
                "distserve",
                "DistServe's schedulers, Kairos's baseline (arXiv 2605.02329): "
                "first come first served, all decode",
                "aggressive",
                _without_rng(Aggressive),
                MappingProxyType({"watermark": 0.99}),
            ),
            Preset(
                "kairos-literal",
                "Kairos (arXiv 2605.02329) as printed: prompts by urgency, decoding by slack",
                "aggressive",
                _without_rng(Aggressive),
                MappingProxyType({"watermark": 0.99, "length_aware": 0, "tpot": 0.05}),
                order="urgency-literal",
                pack="slack-literal",
            ),
            Preset(
                "kairos",
                "Kairos repaired, with Past-Future's admission",
                "past-future",
                PastFuture,
                MappingProxyType(
                    {
                        "window": 1000,
                        "reserve": 0.03,
                        "cold_start": None,
                        "length_aware": 1,
                        "lost_share": 0.1,
                        "tpot": 0.05,
                        "margin": 0.05,
                        "stretch": 4.0,
                    }
                ),
                order="urgency",
                pack="slack",
            ),
        )
    }
)
"""Presets by name."""


OPTIONS = frozenset({"name", "seed", "order", "period", "token_budget", "profile"})
"""What :func:`build` takes by itself: words that no preset has as a parameter."""


def build(
    name: str,
    *,
    seed: int = 0,
    order: str | None = None,
    period: int | None = None,
    token_budget: int = 0,
    profile: LatencyModel | None = None,
    **parameters: float | None,
) -> Policy:
    """Make a preset's policy.

    Args:
        name: one of :data:`PRESETS`.
        seed: of the policy's random source.
        order: one of :data:`ORDERS` or :data:`RANKS`, instead of the preset's.
        period: steps from one admission pass to the next, instead of the preset's.
        token_budget: most tokens in a step; 0 is the engine's limit.
        profile: step times of the machine, for ``slack-literal`` to begin with.
        parameters: overrides of the preset's ``parameters``.

    Raises:
        ValueError: an unknown name, or a value out of range; it names the parameter.
    """
    preset = _find(PRESETS, "preset", name)
    unknown = sorted(set(parameters) - set(preset.parameters))
    if unknown:
        known = ", ".join(preset.parameters) or "none"
        msg = f"preset {name!r} has no parameter {unknown[0]!r}; it has: {known}"
        raise ValueError(msg)
    checked = {key: _checked(preset, key, value) for key, value in parameters.items()}
    values = {**preset.parameters, **checked}
    ranking = {key: values.pop(key) for key in _RANK_PARAMETERS if key in values}
    packing = {key: values.pop(key) for key in _PACK_PARAMETERS if key in values}
    order_name = preset.order if order is None else order
    ranks = order_name in RANKS
    return Policy(
        order=Fcfs() if ranks else _order(order_name),
        admit=preset.admit(np.random.default_rng(seed), **values),
        share=_share(preset.share, token_budget),
        victim=LatestArrived(),
        period=preset.period if period is None else period,
        per_pass=preset.per_pass,
        at_once=preset.share == "static",
        rank=_rank(order_name, ranking) if ranks else None,
        pack=_pack(preset.pack, packing, profile),
    )


def _order(name: str) -> OrderPolicy:
    if name not in ORDERS:
        msg = f"order {name!r} is unknown; known are: {', '.join((*ORDERS, *RANKS))}"
        raise ValueError(msg)
    return ORDERS[name]()


def _rank(name: str, values: Mapping[str, Any]) -> RankPolicy:
    """One of :data:`RANKS`; each takes those of the values that mean something to it."""
    # What a preset of another order does not say is the order's own choice.
    aware = values.get("length_aware", name == "urgency")
    if aware not in {0, 1}:
        msg = f"length_aware is {aware}; it must be 0 or 1"
        raise ValueError(msg)
    time: PromptTime = LengthAware() if aware else RunningRate()
    if name == "urgency":
        share = values.get("lost_share")
        return Urgency(time=time) if share is None else Urgency(share, time=time)
    if name in {"urgency-literal", "least-laxity"}:
        return RANKS[name](time)
    return RANKS[name]()


def _pack(name: str, values: Mapping[str, Any], profile: LatencyModel | None) -> PackPolicy | None:
    if name == "slack-literal":
        return SlackLiteral(values["tpot"], step_table(profile))
    return Slack(**values) if name == "slack" else None


def _share(name: str, token_budget: int) -> SharePolicy:
    return StaticShare() if name == "static" else Continuous(token_budget)


def _checked(preset: Preset, key: str, value: float | None) -> float | None:
    """The value in its parameter's type; configurations carry whole numbers as floats."""
    if value is None and key in _OPTIONAL:
        return None
    if isinstance(preset.parameters[key], float):
        if value is not None:
            return value
        what = "a number"
    elif value is not None and float(value).is_integer():
        return int(value)
    else:
        what = "a whole number"
    msg = f"{key} is {value}; it must be {what}"
    raise ValueError(msg)


def _find(table: Mapping[str, _T], what: str, name: str) -> _T:
    try:
        return table[name]
    except KeyError:
        msg = f"{what} {name!r} is unknown; known are: {', '.join(table)}"
        raise ValueError(msg) from None
