"""Measured runs of a real server: one JSON object per request, with stamps of one clock."""

from __future__ import annotations

import gzip
import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

_SUFFIX = "_requests.jsonl"
_COUNTS = ("input_toks", "output_toks")
_STAMPS = ("queued_ts", "first_token_ts", "last_token_ts")
_SELDOM = 0.01
_SENT, _BEGUN = "arrival_time", "scheduled_ts"


class MeasuredError(ValueError):
    """A run that cannot be read; names the file, the line and the field."""


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """A request of a measured run.

    Attributes:
        arrival: when its client sent it, in seconds on the run's clock.
        prompt, output: tokens.
        first_at, last_at: when its first and its last token came.
        line: of the run's file, from 1.
        begun_at: when it was first planned; None if that is not known.
    """

    arrival: float
    prompt: int
    output: int
    first_at: float
    last_at: float
    line: int = 0
    begun_at: float | None = None

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

    An engine takes requests in between two steps, so ``queued_ts`` lies up to a step after the
    arrival.  Where every request has its ``arrival_time``, of another clock, that counts: the
    least delay from one to the other is taken for what lies between the clocks.

    Raises:
        MeasuredError: a line that is not what it should be.
        OSError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        msg = f"{path}: not a gzip file: {error}"
        raise MeasuredError(msg) from error
    requests: list[MeasuredRequest] = []
    sent: list[float | None] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            request, at = _row(line, f"{path}: line {number}")
            requests.append(replace(request, line=number))
            sent.append(at)
            if (at is None) != (sent[0] is None):
                msg = f"{path}: line {number}: {_SENT} must be in all lines, or in none"
                raise MeasuredError(msg)
    if not requests:
        msg = f"{path}: has no requests"
        raise MeasuredError(msg)
    moments = [at for at in sent if at is not None]
    if moments:
        pairs = list(zip(requests, moments, strict=True))
        apart = min(request.arrival - at for request, at in pairs)
        requests = [replace(r, arrival=min(at + apart, r.arrival)) for r, at in pairs]
    return sorted(requests, key=lambda request: request.arrival)


def places_seen(requests: Sequence[MeasuredRequest]) -> int | None:
    """How many requests the server took in at most, if that can be seen.

    While requests wait for places, all places are taken; while they wait for memory, the number in
    service varies.  So it is seen where most of the time that anyone waited passed with the same
    number in service, and hardly any with more.

    Args:
        requests: the first ones of a run, in order of arrival.

    Returns:
        None if it cannot be seen, or nobody noted when requests were first planned.
    """
    moments: list[tuple[float, int, int]] = []
    for request in requests:
        if request.begun_at is None:
            return None
        begun = max(request.arrival, request.begun_at)
        moments += [(request.arrival, 1, 0), (begun, -1, 1), (request.last_at, 0, -1)]
    moments.sort(key=lambda moment: moment[0])
    passed: dict[int, float] = defaultdict(float)
    waiting = serving = 0
    for (at, waits, serves), (until, _, _) in pairwise(moments):
        waiting, serving = waiting + waits, serving + serves
        if waiting:
            passed[serving] += until - at
    usual = max(passed, key=passed.__getitem__, default=0)
    more = sum(time for serving, time in passed.items() if serving > usual)
    known = passed[usual] > sum(passed.values()) / 2 and more < _SELDOM * passed[usual]
    return usual if known else None


def read_meta(path: Path) -> dict[str, Any]:
    """What is known of the run: ``..._meta.json`` beside its requests; empty if there is none.

    Raises:
        MeasuredError: it is not a JSON object.
    """
    name = path.name.removesuffix(".gz")
    meta = path.with_name(name.removesuffix(_SUFFIX) + "_meta.json")
    if not name.endswith(_SUFFIX) or not meta.is_file():
        return {}
    try:
        return msgspec.json.decode(meta.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        msg = f"{meta}: not a JSON object: {error}"
        raise MeasuredError(msg) from error


def _row(line: bytes, where: str) -> tuple[MeasuredRequest, float | None]:
    """A request by the engine's clock, and when it was sent by its client's."""
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
    if queued == last:
        msg = f"{where}: last_token_ts is {last:g}, as queued_ts; a request must take time"
        raise MeasuredError(msg)
    sent, begun = (
        None if row.get(name) is None else _number(row, name, where) for name in (_SENT, _BEGUN)
    )
    prompt, output = map(int, counts)
    return MeasuredRequest(queued, prompt, output, first, last, begun_at=begun), sent


def _number(row: dict[str, Any], name: str, where: str, least: float = -math.inf) -> float:
    if name not in row:
        msg = f"{where}: {name} is missing"
        raise MeasuredError(msg)
    value = row[name]
    kind = int if least > -math.inf else int | float
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least:
        wanted = "a number" if least == -math.inf else f"a whole number of {least:g} or more"
        msg = f"{where}: {name} is {value!r}; it must be {wanted}"
        raise MeasuredError(msg)
    return float(value)
