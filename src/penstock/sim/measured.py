"""Measured runs of a real server: one JSON object per request, with stamps of one clock."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

_SUFFIX = "_requests.jsonl.gz"
_COUNTS = ("input_toks", "output_toks")
_STAMPS = ("queued_ts", "first_token_ts", "last_token_ts")


class MeasuredError(ValueError):
    """A run that cannot be read; names the file, the line and the field."""


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """A request of a measured run.

    Attributes:
        arrival: when the engine took it in, in seconds on the run's clock.
        prompt, output: tokens.
        first_at, last_at: when its first and its last token came.
    """

    arrival: float
    prompt: int
    output: int
    first_at: float
    last_at: float

    @property
    def ttft(self) -> float:
        """Arrival to first token, in seconds."""
        return self.first_at - self.arrival

    @property
    def tpot(self) -> float:
        """Mean time per token after the first; NaN where there is none."""
        return (self.last_at - self.first_at) / (self.output - 1) if self.output > 1 else math.nan

    @property
    def e2e(self) -> float:
        """Arrival to last token, in seconds."""
        return self.last_at - self.arrival


def read_requests(path: Path) -> list[MeasuredRequest]:
    """Read a run's requests, in order of arrival.

    Raises:
        MeasuredError: a line that is not what it should be.
        OSError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError) as error:
        msg = f"{path}: not a gzip file: {error}"
        raise MeasuredError(msg) from error
    requests = [
        _request(line, f"{path}: line {number}")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not requests:
        msg = f"{path}: has no requests"
        raise MeasuredError(msg)
    return sorted(requests, key=lambda request: request.arrival)


def read_meta(path: Path) -> dict[str, Any]:
    """What is known of the run: ``..._meta.json`` beside its requests; empty if there is none.

    Raises:
        MeasuredError: it is not a JSON object.
    """
    if not path.name.endswith(_SUFFIX):
        return {}
    meta = path.with_name(path.name.removesuffix(_SUFFIX) + "_meta.json")
    if not meta.is_file():
        return {}
    try:
        return msgspec.json.decode(meta.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        msg = f"{meta}: not a JSON object: {error}"
        raise MeasuredError(msg) from error


def _request(line: bytes, where: str) -> MeasuredRequest:
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        msg = f"{where}: not a JSON object: {error}"
        raise MeasuredError(msg) from error
    counts = [_number(row, name, where, least=1) for name in _COUNTS]
    queued, first, last = (_number(row, name, where) for name in _STAMPS)
    if not queued <= first <= last:
        msg = f"{where}: first_token_ts must lie between queued_ts and last_token_ts"
        raise MeasuredError(msg)
    return MeasuredRequest(queued, int(counts[0]), int(counts[1]), first, last)


def _number(row: dict[str, Any], name: str, where: str, least: float = -math.inf) -> float:
    if name not in row:
        msg = f"{where}: {name} is missing"
        raise MeasuredError(msg)
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        wanted = "a number" if least == -math.inf else f"a number of {least:g} or more"
        msg = f"{where}: {name} is {value!r}; it must be {wanted}"
        raise MeasuredError(msg)
    return float(value)
