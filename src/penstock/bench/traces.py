"""Trace files: told apart by their columns; a bad cell is refused by file, row and column.

=====================  ==============================================================  =========
format                 columns                                                         times
=====================  ==============================================================  =========
Azure LLM inference    TIMESTAMP, ContextTokens, GeneratedTokens (CSV)                 date-time
BurstGPT               Timestamp, Request tokens, Response tokens, ... (CSV)           seconds
Mooncake               timestamp, input_length, output_length, hash_ids (JSON lines)   ms
ShareGPT-o1            prompt_tokens, completion_tokens (JSON list)                    none
plain                  [arrival_s,] prompt_tokens, output_tokens (CSV, Parquet)        seconds
=====================  ==============================================================  =========

Each may be gzipped (not Parquet).  Times start at 0 in the result.  Rows are counted from 1, the
header aside; the line on which a row begins is named too.  Other columns are ignored.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.bench.workload import Floats, Ints, Origin, Workload

if TYPE_CHECKING:
    import polars as pl

MOONCAKE_BLOCK = 512
"""Prompt tokens behind one of Mooncake's hash ids."""

SORTED = "rows sorted by time"
"""How the note begins that says so, and names the first row out of order."""

SPREAD = "requests under one time stamp spread evenly up to the next stamp"
"""The note that says so; it holds for the trace's own times."""

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class TraceError(ValueError):
    """A trace file that cannot be used as it stands."""


@dataclass(frozen=True, slots=True)
class _Format:
    """Where the three quantities are; ``unit`` is seconds per unit of the time column."""

    name: str
    prompt: str
    output: str
    time: str | None
    unit: float = 1.0
    failures: bool = False  # a length of 0 marks a failed request, not an error

    @property
    def needed(self) -> set[str]:
        return {self.prompt, self.output} | ({self.time} if self.time else set())


_FORMATS = (
    _Format("Azure LLM inference", "ContextTokens", "GeneratedTokens", "TIMESTAMP", unit=0.0),
    _Format("BurstGPT", "Request tokens", "Response tokens", "Timestamp", failures=True),
    _Format("Mooncake", "input_length", "output_length", "timestamp", unit=1e-3),
    _Format("ShareGPT-o1", "prompt_tokens", "completion_tokens", None),
    _Format("plain", "prompt_tokens", "output_tokens", "arrival_s"),
    _Format("plain", "prompt_tokens", "output_tokens", None),
)
_JSON_KEYS = frozenset(
    {"timestamp", "input_length", "output_length", "hash_ids"}
    | {"prompt_tokens", "completion_tokens", "output_tokens", "arrival_s"}
)


@dataclass(frozen=True, slots=True)
class _Table:
    """A file's rows; ``lines`` says where they are in a text file."""

    path: Path
    frame: pl.DataFrame
    lines: Sequence[int] | None = None

    @property
    def header(self) -> str:
        """Where the columns' names are."""
        return "" if self.lines is None or self.path.suffix == ".json" else "line 1 "

    def place(self, row: int) -> str:
        """Name a row, given by its index."""
        return Origin.place(row, self.lines)

    def refuse(self, row: int, column: str, right: str) -> NoReturn:
        """A cell is not what it must be."""
        value = self.frame[column].to_list()[row]
        shown = "missing" if value is None else repr(value)[:60]
        what = f"{self.place(row)}, column {column!r} is {shown}; it must be {right}"
        _refuse(self.path, what)


def load(path: Path) -> Workload:
    """Read a trace file.

    Raises:
        TraceError: the file, row and column at fault and what would be right.
        OSError: the file cannot be read.
    """
    path.stat()
    table = _json_table(path) if _is_json(path) else _table(path)
    form = _detect(table)
    notes: list[str] = []
    prompt = _counts(table, form.prompt)
    output = _counts(table, form.output)
    keep = _served(table, form, prompt, output)
    if not keep.all():
        notes.append(f"{(~keep).sum()} failed requests of the trace (0 tokens) left out")
    if not keep.any():
        _refuse(path, "has only failed requests (0 tokens)")
    arrival = _arrivals(table, form, keep)
    if arrival is not None and (np.diff(arrival) < 0).any():
        where = table.place(int(np.argmax(np.diff(arrival) < 0)) + 1)
        notes.append(f"{SORTED}: {where}, column {form.time!r}, is before the row above it")
    hash_ids = _hash_ids(table) if "hash_ids" in table.frame.columns else None
    workload = Workload(
        source=f"{path.name} ({form.name})",
        prompt=prompt,
        output=output,
        arrival=arrival,
        hash_ids=hash_ids,
        hash_block=MOONCAKE_BLOCK if hash_ids is not None else 0,
        notes=tuple(notes),
        origin=Origin(str(path), form.prompt, form.output, np.arange(len(prompt)), table.lines),
    )
    return _in_order(workload.take(np.flatnonzero(keep)), spread=form.name == "Mooncake")


def _is_json(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return name.endswith((".json", ".jsonl"))


def _table(path: Path) -> _Table:
    import polars as pl

    try:
        if path.suffix == ".parquet":
            return _Table(path, pl.read_parquet(path))
        frame = pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        if path.suffix != ".parquet":
            _refuse_ragged(path)
        _refuse(path, f"is not a readable table: {str(error).splitlines()[0]}")
    for name in frame.columns:
        if name.endswith("_duplicated_0"):
            _refuse(path, f"line 1 names the column {name.removesuffix('_duplicated_0')!r} twice")
    return _Table(path, frame, _lines(path, frame.height))


def _lines(path: Path, height: int) -> Sequence[int] | None:
    """The line on which each row begins; None where it cannot be told."""
    if b'"' not in _bytes(path):
        return range(2, height + 2)
    try:
        lines = [line for line, _ in _csv_rows(path)][1:]
    except TraceError:
        return None
    return lines if len(lines) == height else None


def _refuse_ragged(path: Path) -> None:
    """Refuse a row with more cells than the header, if that is what is wrong."""
    rows = _csv_rows(path)
    _, header = next(rows, (1, []))
    for number, (line, row) in enumerate(rows, 1):
        if len(row) > len(header):
            last = header[-1] if header else ""
            what = f"{len(row)} cells for {len(header)} columns, the last of which is {last!r}"
            _refuse(path, f"row {number} (line {line}) has {what}")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row, the header too, and the line on which it begins: a quoted cell can span several.

    Raises:
        TraceError: the line of a row that is not CSV.
    """
    rows = csv.reader(io.StringIO(_bytes(path).decode("utf-8", "replace")))
    line = 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        # What follows the dash is for the programmer.
        _refuse(path, f"line {line} is not CSV: {str(error).partition(' - ')[0]}")


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        _refuse(path, f"is not a whole gzip file: {error}")


def _json_table(path: Path) -> _Table:
    import polars as pl

    text = _bytes(path)
    rows: list[object]
    lines: list[int] | None = None
    if text.lstrip()[:1] == b"[":
        try:
            rows = msgspec.json.decode(text, type=list[object])
        except _NOT_JSON as error:
            _refuse(path, f"is not a JSON list: {error}")
    else:
        numbered = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = [_json_line(path, i, line) for i, line in numbered]
        lines = [i for i, _ in numbered]
    known: dict[str, list[object]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            where = Origin.place(number, lines)
            _refuse(path, f"{where} is {row!r:.60}; it must be a JSON object")
        for key in _JSON_KEYS & row.keys():
            known.setdefault(key, [None] * len(rows))[number] = row[key]
    if not rows:
        _refuse(path, "has no rows")
    frame = pl.DataFrame({key: pl.Series(cells, dtype=pl.Object) for key, cells in known.items()})
    return _Table(path, frame, lines)


def _json_line(path: Path, number: int, line: bytes) -> object:
    try:
        return msgspec.json.decode(line)
    except _NOT_JSON as error:
        _refuse(path, f"line {number} is not JSON: {error}")


def _detect(table: _Table) -> _Format:
    columns = set(table.frame.columns)
    for form in _FORMATS:
        if form.needed <= columns:
            if table.frame.height == 0:
                _refuse(table.path, "has no rows")
            return form
    nearest = max(_FORMATS, key=lambda form: len(form.needed & columns))
    known = "; ".join(f"{f.name}: {', '.join(sorted(f.needed))}" for f in _FORMATS)
    found = ", ".join(table.frame.columns) or "(none)"
    what = f"{table.header}has the columns {found}"
    if nearest.needed & columns:
        missing = ", ".join(sorted(nearest.needed - columns))
        what += f"; for a trace in the {nearest.name} format it lacks {missing}"
    return _refuse(table.path, f"{what}; known formats are {known}")


def _counts(table: _Table, column: str) -> Ints:
    """A column of token counts, each a whole number of at least 0."""
    values = _numbers(table.frame, column)
    bad = ~np.isfinite(values) | (values < 0) | (values != np.floor(values)) | (values > 2**53)
    if bad.any():
        table.refuse(int(np.argmax(bad)), column, "a whole number of tokens, at least 1")
    return values.astype(np.int64)


def _numbers(frame: pl.DataFrame, column: str) -> Floats:
    """A column as floats; NaN where a cell is no number."""
    import polars as pl

    series = frame[column]
    if series.dtype == pl.Object:
        return np.array([_number(cell) for cell in series.to_list()], dtype=np.float64)
    if series.dtype == pl.String:
        series = series.str.strip_chars()
    return series.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy().astype(np.float64)


def _number(cell: object) -> float:
    if not isinstance(cell, (int, float)) or isinstance(cell, bool):
        return np.nan
    try:
        return float(cell)
    except OverflowError:
        return np.inf


def _served(table: _Table, form: _Format, prompt: Ints, output: Ints) -> NDArray[np.bool_]:
    served = (prompt > 0) & (output > 0)
    if not form.failures and not served.all():
        row = int(np.argmin(served))
        column = form.prompt if prompt[row] == 0 else form.output
        table.refuse(row, column, "at least 1 token")
    return served


def _arrivals(table: _Table, form: _Format, keep: NDArray[np.bool_]) -> Floats | None:
    """Seconds since the first row to keep."""
    if form.time is None:
        return None
    if form.unit:
        times, hint = _numbers(table.frame, form.time) * form.unit, "a number of at least 0"
        bad = ~np.isfinite(times) | (times < 0)
    else:
        times, hint = _date_times(table.frame, form.time), "a time such as 2023-11-16 18:15:46.68"
        bad = ~np.isfinite(times)
    if bad.any():
        table.refuse(int(np.argmax(bad)), form.time, hint)
    since: Floats = times - times[keep].min()
    return since


def _date_times(frame: pl.DataFrame, column: str) -> Floats:
    import polars as pl

    text = frame[column].str.strip_chars().str.replace(r"(\+00:00|Z)$", "")
    stamps = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    nanoseconds = stamps.dt.epoch("ns").cast(pl.Float64) - (stamps.dt.epoch("ns").min() or 0)
    return nanoseconds.fill_null(np.nan).to_numpy() * 1e-9


_MOST_HASHES = 1 << 48


def _hash_ids(table: _Table) -> tuple[tuple[int, ...], ...]:
    rows = []
    for row, value in enumerate(table.frame["hash_ids"].to_list()):
        if not isinstance(value, list) or not all(
            type(i) is int and 0 <= i < _MOST_HASHES for i in value
        ):
            table.refuse(row, "hash_ids", f"a list of whole numbers from 0, below {_MOST_HASHES}")
        rows.append(tuple(value))
    return tuple(rows)


def _in_order(workload: Workload, *, spread: bool) -> Workload:
    """By arrival; with ``spread``, requests under one coarse stamp are spread up to the next."""
    times = workload.arrival
    if times is None:
        return workload
    notes = list(workload.notes)
    if (np.diff(times) < 0).any():
        workload = workload.take(np.argsort(times, kind="stable"))
        times = np.sort(times)
    stamps, counts = np.unique(times, return_counts=True)
    if spread and counts.max() > 1 and len(stamps) > 1:
        steps = np.append(np.diff(stamps), np.median(np.diff(stamps)))
        offset = np.concatenate([np.arange(n) / n for n in counts])
        times = np.repeat(stamps, counts) + offset * np.repeat(steps, counts)
        notes.append(SPREAD)
    return replace(workload, arrival=times, notes=tuple(notes))


def _refuse(path: Path, what: str) -> NoReturn:
    msg = f"{path}: {what}"
    raise TraceError(msg)
