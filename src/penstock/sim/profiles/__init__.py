"""Step-time profiles: a latency model's coefficients for one model on one machine, as a file.

Those that ship with Penstock are fits of public tables (``tools/fit_profiles``) and say so, with
their error on held-out points.  A profile is something to calibrate, never the truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.forecast.latency.longest import LongestBound
from penstock.core.forecast.latency.roofline import Roofline
from penstock.core.forecast.latency.tiles import Tiles

KINDS: dict[str, type[Affine | LongestBound | Roofline | Tiles]] = {
    "affine": Affine,
    "longest-bound": LongestBound,
    "roofline": Roofline,
    "tiles": Tiles,
}
"""Latency models that a profile can hold the coefficients of."""

TABLE = "llmservingsim:"
"""What stands before the prefix of a table of layer times, in place of a profile's name."""

_SUFFIX = ".json"


class ProfileError(ValueError):
    """A profile that there is not, or that cannot be used; names what and why."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A profile file.

    Attributes:
        name: what it is called; ``MODEL/GPU`` for those that ship with Penstock.
        title: the model and the machine, in words.
        kind: the latency model, one of :data:`KINDS`.
        coefficients: its fields, in seconds.
        source: what was fitted, with its licence.
        error: of the fit; ``held_out_mape`` is the mean relative error on points left out of it.
        note: what else a user should know.
    """

    name: str
    title: str
    kind: str
    coefficients: dict[str, float]
    source: str
    error: dict[str, float | int | str]
    note: str = ""

    def model(self) -> LatencyModel:
        """The latency model.

        Raises:
            ProfileError: an unknown kind, or coefficients that it does not have or cannot take.
        """
        build = KINDS.get(self.kind)
        if build is None:
            msg = f"profile {self.name}: kind is {self.kind!r}; it must be one of {_list(KINDS)}"
            raise ProfileError(msg)
        wanted = [field.name for field in fields(build)]
        if set(wanted) != set(self.coefficients):
            msg = (
                f"profile {self.name}: coefficients has {_list(self.coefficients)}; "
                f"{self.kind} needs {_list(wanted)}"
            )
            raise ProfileError(msg)
        try:
            return build(**self.coefficients)
        except ValueError as error:
            msg = f"profile {self.name}: {error}"
            raise ProfileError(msg) from None

    def save(self, path: Path) -> None:
        """Write it to a file that :func:`find` reads."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def names() -> list[str]:
    """The profiles that ship with Penstock, in alphabetical order."""
    files = (file.name for file in _folder().iterdir())
    return sorted(_name(file) for file in files if file.endswith(_SUFFIX))


def find(name: str) -> Profile:
    """A profile that ships with Penstock, or one in a file.

    Args:
        name: one of :func:`names`, or the path of a profile's file.

    Raises:
        ProfileError: there is none, or its file is not a profile.
    """
    if name in names():
        return _read(_folder().joinpath(name.replace("/", "--") + _SUFFIX).read_bytes(), name)
    path = Path(name)
    if path.is_file():
        return _read(path.read_bytes(), name)
    msg = f"profile is {name!r}; it must be a profile's file or one of {_list(names())}"
    raise ProfileError(msg)


def load(name: str) -> LatencyModel:
    """The latency model of :func:`find`'s profile, or a table of layer times.

    Args:
        name: see there; or ``llmservingsim:PREFIX`` or ``llmservingsim:PREFIX@LAYERS`` for the
            files of :func:`penstock.sim.layer_table.read_layer_table`, without host time.

    Raises:
        ProfileError: see there and :meth:`Profile.model`; or nothing says the model's depth.
        TableError: a file of the table is missing or cannot be used.
    """
    if name.startswith(TABLE):
        return _table(name.removeprefix(TABLE))
    return find(name).model()


def _table(text: str) -> LatencyModel:
    from penstock.sim.layer_counts import layers_of
    from penstock.sim.layer_table import read_layer_table

    prefix, _, said = text.partition("@")
    layers = layers_of(Path(prefix).name) if not said else int(said) if said.isdecimal() else 0
    if not layers:
        msg = (
            f"profile is '{TABLE}{text}'; how many layers the model has is not known by its "
            f"name: write {TABLE}PREFIX@LAYERS"
        )
        raise ProfileError(msg)
    return read_layer_table(prefix, layers)


def _read(text: bytes, name: str) -> Profile:
    try:
        return msgspec.json.decode(text, type=Profile)
    except msgspec.DecodeError as error:
        msg = f"profile {name}: not a profile: {error}"
        raise ProfileError(msg) from None


def _folder() -> Traversable:
    return resources.files(__package__)


def _name(file: str) -> str:
    return file.removesuffix(_SUFFIX).replace("--", "/", 1)


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
