"""Read a server's ``/metrics`` before, during and after a run: evictions and KV memory use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from penstock.bench.client import Target

EVICTIONS = "num_preemptions_total"
KV_USE = "kv_cache_usage_perc"
RUNNING = "num_requests_running"
WAITING = "num_requests_waiting"
_PREFIXES = ("penstock:", "vllm:")


def parse(text: str) -> dict[str, float]:
    """Our four series from the Prometheus text format, summed over labels (KV use: the largest).

    Both ``penstock:`` and ``vllm:`` names are understood; the prefix is dropped.
    """
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            prefix = next((p for p in _PREFIXES if sample.name.startswith(p)), None)
            name = sample.name.removeprefix(prefix or "")
            if prefix is None or name not in {EVICTIONS, KV_USE, RUNNING, WAITING}:
                continue
            before = values.get(name, 0.0)
            values[name] = max(before, sample.value) if name == KV_USE else before + sample.value
    return values


@dataclass(slots=True)
class ServerSide:
    """What the server said of itself; ``samples`` are (time, values) pairs, in order."""

    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def evictions(self, start: float, stop: float) -> int | None:
        """Evictions within a window, from the samples nearest to its ends; None if unknown."""
        series = [(t, v[EVICTIONS]) for t, v in self.samples if EVICTIONS in v]
        if not series:
            return None
        first = min(series, key=lambda pair: abs(pair[0] - start))[1]
        last = min(series, key=lambda pair: abs(pair[0] - stop))[1]
        return round(last - first)

    def mean(self, name: str, start: float, stop: float) -> float | None:
        """Mean of a gauge over the samples within a window; None if there are none."""
        values = [v[name] for t, v in self.samples if name in v and start <= t <= stop]
        return sum(values) / len(values) if values else None


@asynccontextmanager
async def watching(target: Target, interval: float = 0.5) -> AsyncIterator[ServerSide]:
    """Sample ``/metrics`` every ``interval`` seconds; an endpoint without it gives no samples."""
    seen = ServerSide()
    async with target.session() as session:
        await _sample(session, target, seen)
        if not seen.samples:
            yield seen
            return

        async def loop() -> None:
            while True:
                await asyncio.sleep(interval)
                await _sample(session, target, seen)

        task = asyncio.create_task(loop())
        try:
            yield seen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await _sample(session, target, seen)


async def _sample(session: aiohttp.ClientSession, target: Target, seen: ServerSide) -> None:
    try:
        async with session.get(f"{target.root}/metrics") as response:
            text = await response.text()
        values = parse(text) if response.status == 200 else {}
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return  # a sample less: the load itself will show if the server is gone
    if values:
        seen.samples.append((perf_counter(), values))
