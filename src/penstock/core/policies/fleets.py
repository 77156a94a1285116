"""Named compositions for several instances: how requests are batched, sliced and placed.

Each is an instance preset (:mod:`penstock.core.policies.presets`) with answers for the pool before
the instances.  Every instance preset is also one of these: requests go to the instances one by
one, whole.  The rest is the ladder from SCLS's baseline to SCLS (arXiv 2406.13511).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from penstock.core.forecast.lengths import LengthHistory
from penstock.core.policies import presets
from penstock.core.policies.batch.each import Each
from penstock.core.policies.batch.packed import Packed
from penstock.core.policies.dispatch import DispatchPolicy, Interval, PlacePolicy
from penstock.core.policies.move.by_gain import ByGain
from penstock.core.policies.place.forecast_aware import ForecastAware
from penstock.core.policies.place.least_outstanding import LeastOutstanding
from penstock.core.policies.place.max_min import MaxMin
from penstock.core.policies.place.power_of_two import PowerOfTwo
from penstock.core.policies.place.round_robin import RoundRobin

PLACES: Mapping[str, Callable[[np.random.Generator], PlacePolicy]] = MappingProxyType(
    {
        "round-robin": lambda _: RoundRobin(),
        "least-outstanding": lambda _: LeastOutstanding(),
        "power-of-two": PowerOfTwo,
        "max-min": lambda _: MaxMin(),
        "forecast-aware": ForecastAware,
    }
)
"""Placement policies by name; each takes a random source."""

SLICE_PARAMETERS: Mapping[str, float | int] = MappingProxyType(
    {"slice_tokens": 128, "interval": 3.0, "interval_share": 0.5, "safety": 0.9, "batch_size": 16}
)
"""Defaults of what may be overridden where there are slices.

``slice_tokens``: S.  ``interval``: Gamma, in seconds, and ``interval_share``: lambda, both of the
interval between two looks at the pool.  ``safety``: share of the KV memory that a batch may fill.
``batch_size``: of the rungs with fixed batches.  None of them is known from the paper's text.
"""


_PAST = 1000

# Of each instance of a preset that keeps its KV.  At overload Past-Future's own 3 % left 0.4 to
# 1.2 % of the requests evicted and 8 % up to 4 of 12,000; with 10 % no one was, in seven runs.
_KV_RESERVE = 0.10


@dataclass(frozen=True, slots=True)
class FleetPreset:
    """A named composition with slices.

    Attributes:
        source: what it is.
        packed: batches are packed by estimated time; else instances make them in order.
        fixed: batches have at most ``batch_size`` requests.
        place: the name of its placement.
        intervals: ``none``, ``fixed`` or ``adaptive``.
        instance: preset of the instances.
        keeps: requests stay where they are, with their KV, unless a move gains.
    """

    name: str
    source: str
    packed: bool
    fixed: bool
    place: str
    intervals: str
    instance: str = "sls"
    keeps: bool = False

    @property
    def parameters(self) -> Mapping[str, float | int]:
        """Those of :data:`SLICE_PARAMETERS` that mean something here, with their defaults."""
        used = {
            "slice_tokens": True,
            "interval": self.intervals != "none",
            "interval_share": self.intervals == "adaptive",
            "safety": self.packed,
            "batch_size": self.fixed,
        }
        return {name: value for name, value in SLICE_PARAMETERS.items() if used[name]}


_SCLS = "SCLS (arXiv 2406.13511)"
FLEETS: Mapping[str, FleetPreset] = MappingProxyType(
    {
        fleet.name: fleet
        for fleet in (
            FleetPreset(
                "scls-slice", f"{_SCLS}, ladder: sls with slices",
                packed=False, fixed=True, place="round-robin", intervals="none",
            ),
            FleetPreset(
                "scls-pad", f"{_SCLS}, ladder: and batches of similar lengths",
                packed=True, fixed=True, place="round-robin", intervals="fixed",
            ),
            FleetPreset(
                "scls-batch", f"{_SCLS}, ladder: and as large as the memory holds",
                packed=True, fixed=False, place="round-robin", intervals="fixed",
            ),
            FleetPreset(
                "scls-offload", f"{_SCLS}, ladder: and to the least loaded instance",
                packed=True, fixed=False, place="max-min", intervals="fixed",
            ),
            FleetPreset(
                "scls", f"{_SCLS}: and with an adaptive interval",
                packed=True, fixed=False, place="max-min", intervals="adaptive",
            ),
            FleetPreset(
                "scls-kv", "our own: slices that keep their KV, and move only for a gain",
                packed=False, fixed=False, place="least-outstanding", intervals="none",
                instance="past-future", keeps=True,
            ),
        )
    }
)  # fmt: skip
"""Presets with slices, by name; the ladder in its order."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What to run on several instances.

    Attributes:
        dispatch: the answers before the instances.
        preset: of each instance.
        parameters: of that preset.
    """

    dispatch: DispatchPolicy
    preset: str
    parameters: Mapping[str, float | None]


def build_fleet(
    name: str,
    *,
    place: str | None = None,
    seed: int = 0,
    parameters: Mapping[str, float | None] = MappingProxyType({}),
) -> Fleet:
    """Make a preset's answers for several instances.

    Args:
        name: one of :data:`FLEETS`, or of the instance presets.
        place: one of :data:`PLACES`, instead of the preset's; for instance presets the default
            is ``least-outstanding``.
        seed: of the random source.
        parameters: overrides, of :data:`SLICE_PARAMETERS` or of the instance preset.

    Raises:
        ValueError: an unknown name, or a value out of range; it names the parameter.
    """
    if place is not None and place not in PLACES:
        msg = f"place {place!r} is unknown; known are: {', '.join(PLACES)}"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    fleet = FLEETS.get(name)
    if fleet is None:
        if name not in presets.PRESETS:
            known = ", ".join((*presets.PRESETS, *FLEETS))
            msg = f"preset {name!r} is unknown; known are: {known}"
            raise ValueError(msg)
        chosen = PLACES[place or "least-outstanding"](rng)
        if chosen.needs_cost:
            msg = f"place {place!r} needs a preset with slices, such as scls; {name} has none"
            raise ValueError(msg)
        return Fleet(DispatchPolicy(Each(), chosen, Interval()), name, parameters)
    unknown = sorted(set(parameters) - set(fleet.parameters))
    if unknown:
        known = ", ".join(fleet.parameters)
        msg = f"preset {name!r} has no parameter {unknown[0]!r}; it has: {known}"
        raise ValueError(msg)
    values = dict(SLICE_PARAMETERS)
    for key, value in parameters.items():
        if value is None:
            msg = f"{key} is None; it must be a number"
            raise ValueError(msg)
        values[key] = value
    return _sliced(fleet, PLACES[place or fleet.place](rng), values)


def _sliced(fleet: FleetPreset, place: PlacePolicy, values: Mapping[str, float | int]) -> Fleet:
    slice_tokens, size = int(values["slice_tokens"]), int(values["batch_size"])
    for name, value in (("slice_tokens", slice_tokens), ("batch_size", size)):
        if value < 1 or value != values[name]:
            msg = f"{name} is {values[name]}; it must be a whole number of at least 1"
            raise ValueError(msg)
    interval = Interval(
        0.0 if fleet.intervals == "none" else values["interval"],
        values["interval_share"] if fleet.intervals == "adaptive" else 0.0,
    )
    if fleet.keeps:
        move = ByGain(LengthHistory(_PAST), slice_tokens)
        policy = DispatchPolicy(Each(), place, interval, move=move)
        return Fleet(policy, fleet.instance, {"reserve": _KV_RESERVE})
    batch = Packed(size if fleet.fixed else 0) if fleet.packed else Each()
    dispatch = DispatchPolicy(batch, place, interval, slice_tokens, values["safety"])
    return Fleet(dispatch, fleet.instance, {} if fleet.packed else {"batch_size": size})
