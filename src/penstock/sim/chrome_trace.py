"""A simulated run in the Trace Event Format, which Perfetto and chrome://tracing show.

Every instance is a process.  It has a lane with its steps, counters for KV memory and requests,
and as many lanes as requests were in memory at once: a request's stay holds its prefill and its
decoding; an eviction ends a stay and is marked.

Source: the "Trace Event Format" document of the Chromium project.  Times are in microseconds.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import msgspec

from penstock import __version__
from penstock.sim.observe import Observation, Residency
from penstock.sim.outcome import attempt_of
from penstock.sim.run import Record, Run

Event = dict[str, Any]
_STEPS = 0  # lane of the steps; requests have those from 1 on


def write(
    path: Path,
    runs: Iterable[tuple[str, Run, Observation]],
    about: Mapping[str, object],
) -> None:
    """Write named runs to one file, compressed if its name ends in ``.gz``.

    Args:
        path: where to.
        runs: name, run and observation of each instance.
        about: what else to keep in the file.

    Raises:
        OSError: it cannot be written.
    """
    encode = msgspec.json.Encoder().encode
    with gzip.open(path, "wb") if path.name.endswith(".gz") else path.open("wb") as file:
        head = {"penstock": __version__, **about}
        file.write(b'{"displayTimeUnit":"ms","otherData":' + encode(head) + b',"traceEvents":[\n')
        first = True
        for number, (name, run, observation) in enumerate(runs, 1):
            for event in events(name, number, run, observation):
                file.write((b"" if first else b",\n") + encode(event))
                first = False
        file.write(b"\n]}\n")


def events(name: str, process: int, run: Run, observation: Observation) -> Iterator[Event]:
    """The events of one instance."""
    yield _named("process_name", process, _STEPS, name)
    yield _named("thread_name", process, _STEPS, "steps")
    yield from _steps(process, observation)
    stays = observation.residencies(run)
    lanes = lanes_of(stays)
    for lane in range(1, max(lanes, default=0) + 1):
        yield _named("thread_name", process, lane, f"memory {lane}")
    facts = {record.job.id: _facts(record) for record in run.records}
    for stay, lane in zip(stays, lanes, strict=True):
        yield from _stay(process, lane, stay, facts[stay.id])


def lanes_of(stays: Sequence[Residency]) -> list[int]:
    """A lane for each stay, from 1 on, such that no two in a lane overlap; stays by start."""
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    lanes = []
    for stay in stays:
        while taken and taken[0][0] <= stay.start:
            heappush(free, heappop(taken)[1])
        lane = heappop(free) if free else len(taken) + 1
        heappush(taken, (stay.end, lane))
        lanes.append(lane)
    return lanes


def _steps(process: int, observation: Observation) -> Iterator[Event]:
    for step in observation.steps:
        if step.ended > step.began:
            kind = "mixed" if step.prefill and step.decoding else "prefill"
            name = kind if step.prefill else "decode"
            numbers = {
                "steps": step.steps, "decoding": step.decoding, "prefill_tokens": step.prefill,
            }  # fmt: skip
            yield _span(name, process, _STEPS, step.began, step.ended, numbers)
        share = 100 * step.blocks / observation.blocks
        yield _counter("KV memory, %", process, step.began, {"used": round(share, 3)})
        counts = {"running": step.running, "waiting": step.waiting}
        yield _counter("requests", process, step.ended, counts)


def _stay(process: int, lane: int, stay: Residency, facts: Event) -> Iterator[Event]:
    waited = {"waited_s": round(stay.start - stay.waited, 6)}
    name = f"request {stay.id}"
    yield _span(name, process, lane, stay.start, stay.end, {**facts, **waited})
    first = stay.end if stay.first is None else stay.first
    yield _span("prefill", process, lane, stay.start, first, {})
    if stay.end > first:
        yield _span("decode", process, lane, first, stay.end, {})
    if stay.evicted:
        yield {
            "ph": "i", "s": "t", "name": "evicted", "cat": "request", "pid": process,
            "tid": lane, "ts": _micro(stay.end),
        }  # fmt: skip


def _facts(record: Record) -> Event:
    attempt = attempt_of(record)
    return {
        "class": attempt.slo_class,
        "prompt_tokens": attempt.prompt_tokens,
        "output_tokens": attempt.output_tokens,
        "arrival_s": round(attempt.sent, 6),
        "end": attempt.end.value,
        "met": attempt.met,
        "broken": list(attempt.broken),
        "evictions": record.ended.evictions,
    }


def _span(
    name: str, process: int, lane: int, began: float, ended: float, args: Mapping[str, object]
) -> Event:
    start = _micro(began)
    return {
        "ph": "X", "name": name, "cat": "request" if lane else "step", "pid": process,
        "tid": lane, "ts": start, "dur": round(_micro(ended) - start, 3), "args": args,
    }  # fmt: skip


def _counter(name: str, process: int, at: float, values: Mapping[str, float]) -> Event:
    return {"ph": "C", "name": name, "pid": process, "ts": _micro(at), "args": values}


def _named(what: str, process: int, lane: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": lane, "args": {"name": name}}


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)
