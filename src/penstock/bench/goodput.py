"""From token times to goodput: pure functions, for the load generator and any simulator.

Units: seconds and token counts.  A *timeline* is what a client saw of one
attempt; *latencies* are derived from it; an *outcome* says how the attempt
ended; a *summary* counts attempts that ended inside a measuring window.

Definitions (``docs/bench.md`` has them with reasons):

* TTFT: from sending to the first token, queueing and network included.
* TPOT: mean time per output token after the first; none if there is one token.
* gap: largest time between two consecutive tokens (MTPOT in the Past-Future
  paper, arXiv 2507.10150); none if there is one token.
* e2e: from sending to the last token.
* goodput: output tokens per second of requests that met their SLO.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from penstock.core.types import SLO

BOUNDS = ("ttft", "tpot", "gap", "e2e")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a client saw of one attempt.

    Attributes:
        sent: when the request left.
        arrivals: when each piece of output came, in order; a piece holds one token or more.
        output_tokens: tokens in all pieces together; at least ``len(arrivals)`` unless the
            server sends pieces without a token of their own.

    Raises:
        ValueError: times run backwards.
    """

    sent: float
    arrivals: Sequence[float]
    output_tokens: int

    def __post_init__(self) -> None:
        last = self.sent
        for time in self.arrivals:
            if time < last:
                msg = f"timeline has a token at {time} after {last}; times must not decrease"
                raise ValueError(msg)
            last = time


class Latency(NamedTuple):
    """The four latencies of one attempt; None where the attempt has no such thing."""

    ttft: float | None
    tpot: float | None
    gap: float | None
    e2e: float | None


def latency_of(timeline: Timeline) -> Latency:
    """TTFT, TPOT, gap and e2e of one attempt."""
    times = timeline.arrivals
    if not times:
        return Latency(None, None, None, None)
    first, last = times[0], times[-1]
    tpot = gap = None
    if timeline.output_tokens > 1:
        tpot = (last - first) / (timeline.output_tokens - 1)
        gap = max((b - a for a, b in pairwise(times)), default=0.0)
    return Latency(first - timeline.sent, tpot, gap, last - timeline.sent)


def misses(latency: Latency, slo: SLO) -> tuple[str, ...]:
    """The bounds that a completed attempt broke: :meth:`~penstock.core.types.SLO.broken`."""
    return slo.broken(*latency)


class End(StrEnum):
    """How an attempt ended, as the client saw it."""

    COMPLETED = "completed"  # all its output came
    REFUSED = "refused"  # 429, or 503 with Retry-After
    EXPIRED = "expired"  # the server gave it up for its deadline
    ABANDONED = "abandoned"  # the client hung up: too long without a first token
    ERROR = "error"  # anything else that went wrong
    CUT = "cut"  # still running when the measurement ended


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one request.

    Attributes:
        request: index of the request in its workload.
        number: 0 for the first try, 1 for the first retry, and so on.
        ended: when it ended, on the clock of ``timeline``.
        broken: the SLO bounds it broke; empty for a completed attempt that met its SLO.
        detail: the error's text.
    """

    request: int
    number: int
    slo_class: str
    prompt_tokens: int
    output_tokens: int
    sent: float
    ended: float
    end: End
    latency: Latency
    broken: tuple[str, ...] = ()
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether it completed and broke no bound."""
        return self.end is End.COMPLETED and not self.broken


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """Attempts of one SLO class: how many ended, how many met the SLO, and how it was broken."""

    attempts: int
    met: int
    attainment: float | None
    goodput_output_tps: float
    broken: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Summary:
    """Aggregates over the attempts that ended within ``[start, stop]``.

    Attributes:
        seconds: length of the window.
        attempts: attempts that ended in the window, cut ones left out.
        requests_met: distinct requests that met their SLO.
        retries: attempts that were not the first at their request.
        ends: attempts by how they ended.
        errors: attempts by error text.
        attainment: share of the attempts that met their SLO; refusals, errors and
            abandoned attempts count as missed.  None without attempts.
        goodput_output_tps: output tokens per second of attempts that met their SLO.
        goodput_total_tps: the same with prompt tokens added, as the Past-Future paper counts.
        goodput_rps: attempts per second that met their SLO.
        throughput_output_tps: output tokens per second of all attempts, met or not.
        percentiles: by latency name, over completed attempts: p50, p90, p99 and the mean.
        classes: the same shares by SLO class.
    """

    seconds: float
    attempts: int
    requests_met: int
    retries: int
    ends: Mapping[str, int]
    errors: Mapping[str, int]
    attainment: float | None
    goodput_output_tps: float
    goodput_total_tps: float
    goodput_rps: float
    throughput_output_tps: float
    throughput_total_tps: float
    percentiles: Mapping[str, Mapping[str, float]]
    classes: Mapping[str, ClassSummary] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """As plain data, for JSON."""
        return asdict(self)


def summarize(attempts: Iterable[Attempt], start: float, stop: float) -> Summary:
    """Aggregate the attempts that ended after ``start`` and not after ``stop``.

    Raises:
        ValueError: the window is empty.
    """
    if not stop > start:
        msg = f"the window [{start}, {stop}] is empty; stop must lie after start"
        raise ValueError(msg)
    seconds = stop - start
    ended = [a for a in attempts if a.end is not End.CUT and start < a.ended <= stop]
    met = [a for a in ended if a.met]
    output = sum(a.output_tokens for a in met)
    prompt = sum(a.prompt_tokens for a in met)
    produced = sum(a.output_tokens for a in ended)
    read = sum(a.prompt_tokens for a in ended if a.latency.ttft is not None)
    names = sorted({a.slo_class for a in ended})
    return Summary(
        seconds=seconds,
        attempts=len(ended),
        requests_met=len({a.request for a in met}),
        retries=sum(a.number > 0 for a in ended),
        ends=_count(a.end.value for a in ended),
        errors=_count(a.detail for a in ended if a.end is End.ERROR),
        attainment=len(met) / len(ended) if ended else None,
        goodput_output_tps=output / seconds,
        goodput_total_tps=(output + prompt) / seconds,
        goodput_rps=len(met) / seconds,
        throughput_output_tps=produced / seconds,
        throughput_total_tps=(produced + read) / seconds,
        percentiles=percentiles(a.latency for a in ended if a.end is End.COMPLETED),
        classes={n: _class_summary([a for a in ended if a.slo_class == n], seconds) for n in names},
    )


def percentiles(latencies: Iterable[Latency]) -> dict[str, dict[str, float]]:
    """Mean, p50, p90 and p99 (linear interpolation) of each latency that occurs."""
    rows = list(latencies)
    table: dict[str, dict[str, float]] = {}
    for name in BOUNDS:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values:
            cuts = np.percentile(values, PERCENTILES)
            table[name] = {f"p{p}": float(c) for p, c in zip(PERCENTILES, cuts, strict=True)}
            table[name]["mean"] = float(np.mean(values))
    return table


def _class_summary(attempts: Sequence[Attempt], seconds: float) -> ClassSummary:
    met = [a for a in attempts if a.met]
    return ClassSummary(
        attempts=len(attempts),
        met=len(met),
        attainment=len(met) / len(attempts) if attempts else None,
        goodput_output_tps=sum(a.output_tokens for a in met) / seconds,
        broken=_count(name for a in attempts for name in a.broken),
    )


def _count(names: Iterable[str]) -> dict[str, int]:
    table: dict[str, int] = {}
    for name in names:
        table[name] = table.get(name, 0) + 1
    return dict(sorted(table.items()))
