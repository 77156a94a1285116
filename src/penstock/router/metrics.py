"""Prometheus metrics of a router."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from penstock.router.backend import Backend
from penstock.router.circuit import State
from penstock.router.failures import Kind


class Metrics:
    """Counts what happens, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._slices = self._counter(
            "slices", "Slices by backend and outcome: ok, or how they failed.", "backend", "outcome"
        )
        self._retries = self._counter("retries", "Slices tried again, by what failed.", "reason")
        self._requests = self._counter(
            "requests", "Requests by route and HTTP status.", "route", "status"
        )
        self._tokens = self._counter("output_tokens", "Output tokens sent on to clients.")
        self._opened = self._counter("circuit_opened", "Times a circuit opened.", "backend")
        self._circuit = self._gauge(
            "circuit", "1 for the state that a backend's circuit is in.", "backend", "state"
        )
        self._outstanding = self._gauge(
            "outstanding", "Slices sent to a backend and not ended.", "backend"
        )
        self._pooled = self._gauge("pooled", "Requests that wait for a backend.")

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"penstock:router_{name}", words, labels, registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"penstock:router_{name}", words, labels, registry=self.registry)

    def on_slice(self, backend: Backend, failure: Kind | None) -> None:
        """A slice, or a forwarded request, came to an end at a backend."""
        self._slices.labels(backend.url, "ok" if failure is None else failure.value).inc()

    def on_retry(self, failure: Kind) -> None:
        """It will be tried again."""
        self._retries.labels(failure.value).inc()

    def on_open(self, backend: Backend) -> None:
        """A circuit opened."""
        self._opened.labels(backend.url).inc()

    def on_end(self, route: str, status: int, output_tokens: int) -> None:
        """A request ended, with what was sent as its status."""
        self._requests.labels(route, str(status)).inc()
        self._tokens.inc(output_tokens)

    def exposition(
        self, backends: Iterable[Backend], outstanding: dict[int, int], pooled: int
    ) -> bytes:
        """The Prometheus text format.

        Args:
            outstanding: slices by backend number.
        """
        for backend in backends:
            self._outstanding.labels(backend.url).set(outstanding.get(backend.number, 0))
            for state in State:
                here = float(backend.circuit.state is state)
                self._circuit.labels(backend.url, state.value).set(here)
        self._pooled.set(pooled)
        return generate_latest(self.registry)
