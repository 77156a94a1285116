"""Attainment and goodput, judged where the tokens come out of vLLM's engine.

Names, and what counts as met, missed or refused, are those of Penstock's own server
(:mod:`penstock.server.metrics`).  Times run from a request's arrival at vLLM's front end to the end
of the step that brought the token; HTTP is not in them.
"""

from __future__ import annotations

from collections import Counter as Counts
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from penstock.core.stats import Stats
from penstock.core.types import RequestId
from penstock.server.metrics import PLANNING_BUCKETS
from penstock.server.slo import DEFAULT_CLASS, Promise
from penstock.vllm.verdict import Kind

_REPORT_SECONDS = 10.0


@dataclass(slots=True)
class _Open:
    """A request that has not ended: its promise, and when its tokens came."""

    promise: Promise
    arrival: float
    first: float = 0.0
    latest: float = 0.0
    gap: float = 0.0
    tokens: int = 0

    def token(self, now: float) -> None:
        if self.tokens:
            self.gap = max(self.gap, now - self.latest)
        else:
            self.first = now
        self.latest = now
        self.tokens += 1

    def kept(self) -> bool:
        """Whether every bound was."""
        slo = self.promise.slo
        if not self.tokens:
            return not slo.broken(None, None, None, None)
        tpot = (self.latest - self.first) / max(1, self.tokens - 1)
        return not slo.broken(self.first - self.arrival, tpot, self.gap, self.latest - self.arrival)


class Tally:
    """Counts outcomes by class, in a registry of its own.

    Args:
        model: the label ``model_name``.
        now: when counting begins.
    """

    def __init__(self, model: str, now: float) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._open: dict[RequestId, _Open] = {}
        self._evictions = 0
        # Since the last report: outcomes, and tokens of those met.
        self._recent: Counts[str] = Counts()
        self._reported = now
        self._declare()

    def _declare(self) -> None:
        one, registry = ["model_name"], self.registry
        self._outcomes = Counter(
            "penstock:slo_requests", "Requests by class: met, missed or refused.",
            [*one, "slo_class", "outcome"], registry=registry,
        )  # fmt: skip
        self._goodput = Counter(
            "penstock:goodput_tokens", "Output tokens of requests that met their SLO.",
            [*one, "slo_class"], registry=registry,
        )  # fmt: skip
        self._failures = Counter(
            "penstock:request_failure", "Requests that did not end well, by reason.",
            [*one, "reason"], registry=registry,
        )  # fmt: skip
        words = {
            "num_requests_running": "Requests that hold KV memory.",
            "num_requests_waiting": "Requests that wait for admission.",
            "kv_cache_usage_perc": "KV memory in use; 1 is all of it.",
            "predicted_wait_seconds": "Until a request that came now would be admitted.",
        }
        self._gauges = {
            name: Gauge(f"penstock:{name}", text, one, registry=registry).labels(self._model)
            for name, text in words.items()
        }
        self._preemptions = Counter(
            "penstock:num_preemptions", "Evictions: requests that lost their KV memory.",
            one, registry=registry,
        ).labels(self._model)  # fmt: skip
        self._planning = Histogram(
            "penstock:planning_seconds", "What planning took, per step.",
            one, registry=registry, buckets=PLANNING_BUCKETS,
        ).labels(self._model)  # fmt: skip

    def taken(self, request_id: RequestId, promise: Promise, arrival: float) -> None:
        """A request waits."""
        self._open[request_id] = _Open(promise, arrival)

    def token(self, request_id: RequestId, now: float) -> None:
        """It got a token."""
        if (one := self._open.get(request_id)) is not None:
            one.token(now)

    def served(self, request_id: RequestId) -> None:
        """It came to its own end."""
        one = self._open.pop(request_id, None)
        if one is None:
            return
        kept = one.kept()
        self._count(one.promise.slo_class, "met" if kept else "missed")
        if kept:
            self._goodput.labels(self._model, one.promise.slo_class).inc(one.tokens)
            self._recent["tokens"] += one.tokens

    def left(self, request_id: RequestId) -> None:
        """Its client did; that is no outcome."""
        if self._open.pop(request_id, None) is not None:
            self._failures.labels(self._model, "cancelled").inc()

    def judged(self, request_id: RequestId, kind: Kind) -> None:
        """The scheduler ended it; what can never be served is no outcome either."""
        one = self._open.pop(request_id, None)
        slo_class = DEFAULT_CLASS if one is None else one.promise.slo_class
        self._failures.labels(self._model, kind).inc()
        if kind != "invalid":
            self._count(slo_class, "refused" if kind in {"refused", "rejected"} else "missed")

    def step(self, stats: Stats, planning: float) -> None:
        """A step was planned, in so many seconds."""
        self._planning.observe(planning)
        gauges = self._gauges
        gauges["num_requests_running"].set(stats.running)
        gauges["num_requests_waiting"].set(stats.waiting)
        gauges["kv_cache_usage_perc"].set(stats.kv_usage)
        gauges["predicted_wait_seconds"].set(stats.load.predicted_wait)
        self._preemptions.inc(stats.evictions - self._evictions)
        self._recent["evictions"] += stats.evictions - self._evictions
        self._evictions = stats.evictions

    def report(self, now: float) -> str | None:
        """One line about the last ten seconds, once in that time, if anyone ended."""
        seconds = now - self._reported
        if seconds < _REPORT_SECONDS:
            return None
        recent, self._recent, self._reported = self._recent, Counts(), now
        judged = recent["met"] + recent["missed"] + recent["refused"]
        if not judged:
            return None
        return (
            f"attainment {100 * recent['met'] / judged:.1f} % of {judged} requests "
            f"({recent['missed']} missed, {recent['refused']} refused), goodput "
            f"{recent['tokens'] / seconds:.1f} tok/s, {recent['evictions']} evictions"
        )

    def _count(self, slo_class: str, outcome: str) -> None:
        self._outcomes.labels(self._model, slo_class, outcome).inc()
        self._recent[outcome] += 1
