"""The page of a report: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jinja2

from penstock import __version__
from penstock.bench.result import command_line, machine


class Key(NamedTuple):
    """An entry of a figure's key: ``kind`` is line, band or dash; the colour is a variable."""

    name: str
    colour: str
    kind: str = "line"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with its caption; ``svg`` is taken as it is, all else is escaped."""

    title: str
    text: str
    svg: str
    key: Sequence[Key] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, in the order title, text, figures, tables."""

    title: str = ""
    text: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def write(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    lead: Sequence[str] = (),
    notes: Sequence[str] = (),
    settings: Mapping[str, object],
) -> None:
    """Write the page; at its end stands what made it.

    Raises:
        OSError: it cannot be written.
    """
    source = files("penstock.sim").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    provenance = {
        "command": command_line(),
        "penstock": __version__,
        **machine(),
        **{name: value for name, value in settings.items() if value not in (None, (), [], {})},
    }
    text = template.render(
        title=title, lead=lead, sections=sections, notes=notes, provenance=provenance.items()
    )
    path.write_text(text, encoding="utf-8")
