"""What ``penstock route`` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
from cyclopts import Parameter

from penstock.config import ConfigError
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.slices import SliceCost
from penstock.core.policies.batch.each import Each
from penstock.core.policies.dispatch import DispatchPolicy, Interval, PlacePolicy
from penstock.core.policies.fleets import PLACES

ROUTER_PLACES = ("round-robin", "least-outstanding", "power-of-two", "max-min")
"""Placements that need to know nothing of a backend's memory."""

MAX_SLICE = 1 << 20
_PROMPT_PRICE = 0.005  # of a prompt token, in decode steps: about what GPUs show


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class Settings:
    """The flags.

    Attributes:
        backend: Address of a server, such as http://gpu1:8000; once for each.
        host: Address to listen on; 0.0.0.0 is every interface.
        port: Port to listen on; 0 picks a free one.
        slice_tokens: Most output tokens that a request gets before any backend may go on with
            it; 0: requests go whole.
        place: round-robin, least-outstanding, power-of-two or max-min.
        gap_timeout: Seconds without a chunk of a stream, the first included, after which a backend
            has failed.
        max_wait: Most seconds that a request waits, between two slices, for a backend that may
            take it.
        retries: Failures in a row that a request survives.
        failures: Failures in a row that open a backend's circuit.
        backoff: Seconds until an open circuit is first probed; doubled after each failure.
        max_backoff: Most seconds between two probes, and that a busy backend is left alone.
        drain_seconds: After SIGTERM, how long open requests may take to end.
        api_key: Bearer token of the router's own probes; requests carry their clients'.
    """

    backend: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    slice_tokens: int = 128
    place: str = "least-outstanding"
    gap_timeout: float = 60.0
    max_wait: float = 30.0
    retries: int = 4
    failures: int = 3
    backoff: float = 1.0
    max_backoff: float = 30.0
    drain_seconds: float = 30.0
    api_key: Annotated[str, Parameter(env_var="PENSTOCK_ROUTE_API_KEY", show_default=False)] = (
        field(default="", repr=False)
    )

    def checked(self) -> Settings:
        """The same, with base addresses without ``/v1``.

        Raises:
            ConfigError: a value is out of range; it names the flag.
        """
        urls = tuple(_root(url, number) for number, url in enumerate(self.backend, 1))
        if not urls:
            msg = "--backend is missing; give the address of each server, such as http://gpu1:8000"
            raise ConfigError(msg)
        for url in urls:
            if urls.count(url) > 1:
                msg = f"--backend {url} is given twice; each server needs one"
                raise ConfigError(msg)
        if self.place not in ROUTER_PLACES:
            msg = f"--place {self.place}; it must be one of: {', '.join(ROUTER_PLACES)}"
            raise ConfigError(msg)
        if not 0 <= self.slice_tokens <= MAX_SLICE:
            msg = f"--slice-tokens {self.slice_tokens}; it must be 1 to {MAX_SLICE},"
            raise ConfigError(f"{msg} or 0 for whole requests")
        if self.place == "max-min" and not self.slice_tokens:
            msg = "--place max-min needs slices: without them nobody can say what a request costs"
            raise ConfigError(f"{msg}; --slice-tokens must be at least 1")
        self._check_ranges()
        return replace(self, backend=urls)

    def _check_ranges(self) -> None:
        for name, least in (
            ("port", 0),
            ("retries", 0),
            ("failures", 1),
            ("max_wait", 0.0),
            ("drain_seconds", 0.0),
        ):
            if not least <= getattr(self, name) < float("inf"):
                msg = f"{_flag(name)} {getattr(self, name)}; it must be at least {least}"
                raise ConfigError(msg)
        if self.port > 65535:
            msg = f"--port {self.port}; it must be at most 65535"
            raise ConfigError(msg)
        for name in ("gap_timeout", "backoff", "max_backoff"):
            if not 0 < getattr(self, name) < float("inf"):
                msg = f"{_flag(name)} {getattr(self, name)}; it must be more than 0 seconds"
                raise ConfigError(msg)
        if self.max_backoff < self.backoff:
            msg = f"--max-backoff {self.max_backoff} is less than --backoff {self.backoff}"
            raise ConfigError(msg)

    def policy(self, place: PlacePolicy) -> DispatchPolicy:
        """Requests go out one by one, as soon as there is someone to take them."""
        return DispatchPolicy(Each(), place, Interval(), self.slice_tokens)

    def placement(self) -> PlacePolicy:
        """The chosen placement."""
        return PLACES[self.place](np.random.default_rng())

    def cost(self, kv_tokens: int) -> SliceCost:
        """What a slice costs, in decode steps: enough to compare loads, for any server."""
        model = Bilinear((_PROMPT_PRICE, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0))
        return SliceCost(model, max(1, self.slice_tokens), kv_tokens, 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _root(url: str, number: int) -> str:
    """The base address of what was given as the backend of that number."""
    if any(mark in url for mark in "@?#"):
        # Where a secret ends is a guess in an address that is wrong, so that none of it is shown.
        msg = f"--backend number {number} has a user name, a password, a query or a fragment, which"
        hint = "it must be an address such as http://gpu1:8000; a key is given by --api-key"
        raise ConfigError(f"{msg} errors, logs and metrics would show; {hint}")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        msg = f"--backend {url}; it must be an address such as http://gpu1:8000"
        raise ConfigError(msg)
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
