"""Prometheus metrics, named like vLLM's under ``penstock:`` so that dashboards carry over.

The same numbers feed the live page.  A request is *met* when it ended well and
kept every bound it asked for, *missed* when it ended otherwise or late, and
*refused* when it was turned away; a client that leaves is none of these.
Goodput is the growth of ``penstock:goodput_tokens_total``: output tokens of
met requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from penstock.core.types import FinishReason
from penstock.server.choice import Choice, met, time_per_token
from penstock.server.messages import Gauges, Step

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
         40, 80, 160)  # fmt: skip
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
         2.5, 5)  # fmt: skip
_E2E = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PLANNING_BUCKETS = (
    0.00001, 0.00002, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1,
)  # fmt: skip
"""Seconds that a step's planning may take."""
_WINDOW = 10.0


class Metrics:
    """Counts everything that happens, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._evictions = 0
        self._received = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._per_class: dict[str, dict[str, int]] = {}
        self._declare_gauges()
        self._declare_counters()
        self._declare_histograms()

    def _gauge(self, name: str, words: str) -> Gauge:
        gauge = Gauge(f"penstock:{name}", words, ["model_name"], registry=self.registry)
        return gauge.labels(self._model)

    def _counter(self, name: str, words: str) -> Counter:
        counter = Counter(f"penstock:{name}", words, ["model_name"], registry=self.registry)
        return counter.labels(self._model)

    def _labelled(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"penstock:{name}", words, ["model_name", *labels], registry=self.registry)

    def _of_instances(self, name: str, words: str) -> Gauge:
        labels = ["model_name", "instance"]
        return Gauge(f"penstock:{name}", words, labels, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"penstock:{name}", words, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model)

    def _declare_gauges(self) -> None:
        self.running = self._gauge("num_requests_running", "Requests that hold KV memory.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for admission.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "KV memory in use; 1 is all of it.")
        self.host_tokens = self._gauge(
            "kv_host_tokens", "Tokens of evicted requests whose KV is in host memory."
        )
        self.engine_up = self._gauge("engine_up", "1 while an engine is loaded.")
        of = self._of_instances
        self.instance_running = of("instance_requests_running", "Requests that hold KV memory.")
        self.instance_waiting = of("instance_requests_waiting", "Requests that wait there.")
        self.instance_kv_usage = of("instance_kv_cache_usage_perc", "KV memory in use there.")
        self.instance_load = of(
            "instance_load_seconds", "Estimated seconds of what it was sent and is not completed."
        )

    def _declare_counters(self) -> None:
        self.preemptions = self._counter(
            "num_preemptions", "Evictions: requests that lost their KV memory."
        )
        self.swapped_out = self._counter(
            "kv_swapped_out_tokens", "Tokens whose KV went to host memory on an eviction."
        )
        self.swapped_in = self._counter(
            "kv_swapped_in_tokens", "Tokens whose KV came back, instead of being computed again."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of served requests.")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens.")
        self.restarts = self._counter("engine_restarts", "Times an engine process ended by itself.")
        self.instance_restarts = self._labelled(
            "instance_restarts", "Times an instance ended by itself.", "instance"
        )
        self.hand_offs = self._counter("kv_hand_offs", "Requests whose KV changed its instance.")
        self.hand_off_bytes = self._counter("kv_hand_off_bytes", "Bytes of that KV.")
        self.finished = self._labelled(
            "request_success", "Requests that ended well, by finish reason.", "finished_reason"
        )
        self.unserved = self._labelled(
            "request_failure", "Requests that did not end well, by reason.", "reason"
        )
        self.refused = self._labelled(
            "request_refused", "Requests turned away at the edge, by the limit they hit.", "limit"
        )
        self.outcomes = self._labelled(
            "slo_requests", "Requests by class: met, missed or refused.", "slo_class", "outcome"
        )
        self.goodput = self._labelled(
            "goodput_tokens", "Output tokens of requests that met their SLO.", "slo_class"
        )

    def _declare_histograms(self) -> None:
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token, queueing included.", _TTFT
        )
        self.gap = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request.", _TPOT
        )
        self.tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time per token after the first.", _TPOT
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E)
        self.hand_off_seconds = self._histogram(
            "kv_hand_off_seconds",
            "From a prefill's end to its KV at a decode instance.",
            _TTFT,
        )
        self.step_seconds = self._histogram("step_seconds", "Duration of a step.", _STEP)
        self.planning_seconds = self._histogram(
            "planning_seconds", "What planning took, per step.", PLANNING_BUCKETS
        )

    # -- what happens ----------------------------------------------------------------------

    def on_ready(self) -> None:
        """An engine process is loaded; its own counts begin again."""
        self._evictions = 0
        self.engine_up.set(1)

    def on_death(self) -> None:
        """The engine process is gone, and all it held."""
        self.engine_up.set(0)
        self.restarts.inc()
        for gauge in (self.running, self.waiting, self.kv_usage, self.host_tokens):
            gauge.set(0)

    def on_instance(self, number: int, gauges: Gauges, load: float) -> None:
        """One instance's books; the sums over all come with :meth:`on_step`."""
        labels = (self._model, str(number))
        self.instance_running.labels(*labels).set(gauges.running)
        self.instance_waiting.labels(*labels).set(gauges.waiting)
        self.instance_kv_usage.labels(*labels).set(gauges.kv_usage)
        self.instance_load.labels(*labels).set(load)

    def on_hand_off(self, size: int, seconds: float) -> None:
        """KV went from one instance to another."""
        self.hand_offs.inc()
        self.hand_off_bytes.inc(size)
        self.hand_off_seconds.observe(seconds)

    def on_instance_lost(self, number: int, *, left: int) -> None:
        """One instance is gone; with ``left`` at 0 it was the last."""
        self.on_instance(number, Gauges(0, 0, 0, 0, 0.0, 0, None), 0.0)
        self.instance_restarts.labels(self._model, str(number)).inc()
        self.restarts.inc()
        if not left:
            self.engine_up.set(0)

    def on_step(self, step: Step) -> None:
        """Take over a step's books."""
        gauges = step.gauges
        self.running.set(gauges.running)
        self.waiting.set(gauges.waiting)
        self.kv_usage.set(gauges.kv_usage)
        if gauges.evictions > self._evictions:
            self.preemptions.inc(gauges.evictions - self._evictions)
            self._evictions = gauges.evictions
        self.host_tokens.set(gauges.host_tokens)
        self.swapped_out.inc(step.swapped.out)
        self.swapped_in.inc(step.swapped.back)
        if step.tokens:
            self.generation_tokens.inc(len(step.tokens))
        if step.seconds:
            self.step_seconds.observe(step.seconds)
            self.planning_seconds.observe(step.planning)

    def on_token(self, choice: Choice, gap: float | None) -> None:
        """A token came."""
        if gap is None:
            self.ttft.observe(choice.times.first - choice.times.arrival)
            self.prompt_tokens.inc(choice.prompt_tokens)
        else:
            self.gap.observe(gap)

    def on_end(self, choice: Choice) -> None:
        """A request ended."""
        slo_class = choice.promise.slo_class
        if choice.finish_reason is None:
            reason = str(choice.reason)
            self.unserved.labels(self._model, reason).inc()
            if choice.reason is not FinishReason.CANCELLED:
                refused = choice.reason is FinishReason.REJECTED
                self._outcome(slo_class, "refused" if refused else "missed", 0)
            return
        self.finished.labels(self._model, choice.finish_reason).inc()
        self.e2e.observe(choice.times.end - choice.times.arrival)
        if choice.tokens > 1:
            self.tpot.observe(time_per_token(choice))
        if met(choice):
            self._outcome(slo_class, "met", choice.tokens)
            self.goodput.labels(self._model, slo_class).inc(choice.tokens)
            self._recent.append((choice.times.end, choice.tokens))
            self._forget(choice.times.end)  # nobody may ever ask for the rate
        else:
            self._outcome(slo_class, "missed", choice.tokens)

    def on_refusal(self, slo_class: str, limit: str, choices: int) -> None:
        """The edge turned a request of that many choices away."""
        self.refused.labels(self._model, limit).inc(choices)
        for _ in range(choices):
            self._outcome(slo_class, "refused", 0)

    def _outcome(self, slo_class: str, outcome: str, tokens: int) -> None:
        self.outcomes.labels(self._model, slo_class, outcome).inc()
        row = self._per_class.setdefault(
            slo_class, {"met": 0, "missed": 0, "refused": 0, "goodput_tokens": 0}
        )
        row[outcome] += 1
        if outcome == "met":
            row["goodput_tokens"] += tokens

    # -- what people read ------------------------------------------------------------------

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def classes(self) -> Mapping[str, Mapping[str, int]]:
        """Outcomes and goodput tokens by class since the start."""
        return self._per_class

    def goodput_rate(self, now: float) -> float:
        """Output tokens per second of met requests that ended in the last ten seconds."""
        self._forget(now)
        return sum(tokens for _, tokens in self._recent) / _WINDOW

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()
