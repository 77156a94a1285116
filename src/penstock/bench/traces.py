"""Trace files: told apart by their columns; a bad cell is refused by file, line and column.

=====================  ==============================================================  =========
format                 columns                                                         times
=====================  ==============================================================  =========
Azure LLM inference    TIMESTAMP, ContextTokens, GeneratedTokens (CSV)                 date-time
BurstGPT               Timestamp, Request tokens, Response tokens, ... (CSV)           seconds
Mooncake               timestamp, input_length, output_length, hash_ids (JSON lines)   ms
ShareGPT-o1            prompt_tokens, completion_tokens (JSON list)                    none
plain                  [arrival_s,] prompt_tokens, output_tokens (CSV, Parquet)        seconds
=====================  ==============================================================  =========

Each may be gzipped (not Parquet).  Times start at 0 in the result.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.bench.workload import Floats, Ints, Workload

if TYPE_CHECKING:
    import polars as pl

MOONCAKE_BLOCK = 512
"""Prompt tokens behind one of Mooncake's hash ids."""

SORTED = "rows sorted by time"
"""How the note begins that says so, and names the first row out of order."""


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


def load(path: Path) -> Workload:
    """Read a trace file.

    Raises:
        TraceError: the file, line and column at fault and what would be right.
        OSError: the file cannot be read.
    """
    first = 1 if _is_json(path) else 2  # the line of the first row; Parquet rows count from 1
    frame = _json_frame(path) if first == 1 else _frame(path)
    if path.suffix == ".parquet":
        first = 1
    form = _detect(path, frame.columns)
    if frame.height == 0:
        _refuse(path, "has no rows")
    notes: list[str] = []
    prompt = _counts(path, frame, form.prompt, first)
    output = _counts(path, frame, form.output, first)
    keep = _served(path, form, prompt, output, first)
    if not keep.all():
        notes.append(f"{(~keep).sum()} failed requests of the trace (0 tokens) left out")
    if not keep.any():
        _refuse(path, "has only failed requests (0 tokens)")
    arrival = _arrivals(path, frame, form, first)
    if arrival is not None and (np.diff(arrival) < 0).any():
        line = int(np.argmax(np.diff(arrival) < 0)) + 1 + first
        notes.append(f"{SORTED}: line {line}, column {form.time!r}, is before the line above it")
    hash_ids = _hash_ids(path, frame) if "hash_ids" in frame.columns else None
    workload = Workload(
        source=f"{path.name} ({form.name})",
        prompt=prompt,
        output=output,
        arrival=arrival,
        hash_ids=hash_ids,
        hash_block=MOONCAKE_BLOCK if hash_ids is not None else 0,
        notes=tuple(notes),
    )
    return _in_order(workload.take(np.flatnonzero(keep)), spread=form.name == "Mooncake")


def _is_json(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return name.endswith((".json", ".jsonl"))


def _frame(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        _refuse(path, f"is not a readable table: {str(error).splitlines()[0]}")


def _json_frame(path: Path) -> pl.DataFrame:
    import polars as pl

    raw = path.read_bytes()
    try:
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (gzip.BadGzipFile, EOFError) as error:
        _refuse(path, f"is not a gzip file: {error}")
    rows: list[object]
    if text.lstrip()[:1] == b"[":
        try:
            rows = msgspec.json.decode(text, type=list[object])
        except msgspec.DecodeError as error:
            _refuse(path, f"is not a JSON list: {error}")
    else:
        rows = [_json_line(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line]
    keys = {"timestamp", "input_length", "output_length", "hash_ids"}
    keys |= {"prompt_tokens", "completion_tokens", "output_tokens", "arrival_s"}
    known: dict[str, list[object]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            _refuse(path, f"row {number} is {row!r:.60}; it must be a JSON object")
        for key in keys & row.keys():
            known.setdefault(key, [None] * len(rows))[number - 1] = row[key]
    return pl.DataFrame({key: pl.Series(values, dtype=pl.Object) for key, values in known.items()})


def _json_line(path: Path, number: int, line: bytes) -> object:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        _refuse(path, f"line {number} is not JSON: {error}")


def _detect(path: Path, columns: Sequence[str]) -> _Format:
    for form in _FORMATS:
        if form.needed <= set(columns):
            return form
    known = "; ".join(f"{f.name}: {', '.join(sorted(f.needed))}" for f in _FORMATS)
    found = ", ".join(columns) or "(none)"
    return _refuse(path, f"has the columns {found}; known formats are {known}")


def _counts(path: Path, frame: pl.DataFrame, column: str, first: int) -> Ints:
    """A column of token counts, each a whole number of at least 0."""
    values = _numbers(frame, column)
    bad = ~np.isfinite(values) | (values < 0) | (values != np.floor(values)) | (values > 2**53)
    if bad.any():
        row = int(np.argmax(bad))
        _refuse_cell(path, frame, column, row, first, "a whole number of tokens")
    return values.astype(np.int64)


def _numbers(frame: pl.DataFrame, column: str) -> Floats:
    """A column as floats; NaN where a cell is no number."""
    import polars as pl

    series = frame[column]
    if series.dtype == pl.Object:
        return np.array(
            [v if type(v) in (int, float) else np.nan for v in series.to_list()], dtype=np.float64
        )
    if series.dtype == pl.String:
        series = series.str.strip_chars()
    return series.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy().astype(np.float64)


def _served(path: Path, form: _Format, prompt: Ints, output: Ints, first: int) -> NDArray[np.bool_]:
    served = (prompt > 0) & (output > 0)
    if not form.failures and not served.all():
        row = int(np.argmin(served))
        column = form.prompt if prompt[row] == 0 else form.output
        _refuse(path, f"line {row + first}, column {column!r} is 0; it must be at least 1 token")
    return served


def _arrivals(path: Path, frame: pl.DataFrame, form: _Format, first: int) -> Floats | None:
    if form.time is None:
        return None
    if form.unit:
        times, hint = _numbers(frame, form.time) * form.unit, "a number of at least 0"
        bad = ~np.isfinite(times) | (times < 0)
    else:
        times, hint = _date_times(frame, form.time), "a time such as 2023-11-16 18:15:46.68"
        bad = ~np.isfinite(times)
    if bad.any():
        _refuse_cell(path, frame, form.time, int(np.argmax(bad)), first, hint)
    start: Floats = times - times.min()
    return start


def _date_times(frame: pl.DataFrame, column: str) -> Floats:
    import polars as pl

    text = frame[column].str.strip_chars().str.replace(r"(\+00:00|Z)$", "")
    stamps = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    nanoseconds = stamps.dt.epoch("ns").cast(pl.Float64) - (stamps.dt.epoch("ns").min() or 0)
    return nanoseconds.fill_null(np.nan).to_numpy() * 1e-9


def _hash_ids(path: Path, frame: pl.DataFrame) -> tuple[tuple[int, ...], ...]:
    rows = []
    for number, value in enumerate(frame["hash_ids"].to_list(), 1):
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            _refuse(
                path,
                f"line {number}, column 'hash_ids' is {value!r:.60}; "
                "it must be a list of whole numbers",
            )
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
        notes.append("requests under one time stamp spread evenly up to the next stamp")
    return Workload(
        workload.source,
        workload.prompt,
        workload.output,
        times,
        workload.hash_ids,
        workload.hash_block,
        notes=tuple(notes),
    )


def _refuse_cell(
    path: Path, frame: pl.DataFrame, column: str, row: int, first: int, right: str
) -> NoReturn:
    value = frame[column].to_list()[row]
    _refuse(path, f"line {row + first}, column {column!r} is {value!r}; it must be {right}")


def _refuse(path: Path, what: str) -> NoReturn:
    msg = f"{path}: {what}"
    raise TraceError(msg)
