"""What the plug-in can be told: the member ``penstock`` of vLLM's ``--additional-config``.

Its tree is that of Penstock's own configuration, as far as it has to do with scheduling::

    --additional-config '{"penstock": {"scheduler": {"preset": "kairos"},
                                       "slo": {"chat": {"ttft": 0.5, "on_miss": "expire"}}}}'
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from penstock.core.gate import Limits
from penstock.settings import SchedulerConfig, Section, SLOClass

MEMBER = "penstock"


class QueueLimits(Section):
    """Limits of the queue.  Unlike Penstock's own server, vLLM's has none unless one is set."""

    max_waiting: int = Field(
        0, ge=0, description="Most requests that wait for admission; 0 is no limit."
    )
    max_waiting_tokens: int = Field(
        0, ge=0, description="Most prompt tokens of requests that wait; 0 is no limit."
    )

    @property
    def limits(self) -> Limits:
        """The same, as the gate knows them."""
        return Limits(self.max_waiting, self.max_waiting_tokens)


class TraceHook(Section):
    """A hook that only benchmarks want."""

    trace_lengths: bool = Field(
        False, description="Heed trace_output_tokens: the output ends at that length."
    )


class PluginConfig(Section):
    """Everything that the plug-in can be told."""

    scheduler: SchedulerConfig = SchedulerConfig()
    admission: QueueLimits = QueueLimits()
    bench: TraceHook = TraceHook()
    slo: dict[str, SLOClass] = Field(default_factory=dict)
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="Where Prometheus may scrape the scheduler's numbers."
    )


def read(additional: object) -> PluginConfig:
    """The plug-in's part of vLLM's ``additional_config``.

    Raises:
        ValueError: naming the member, its value and what would be right.
    """
    given = additional.get(MEMBER, {}) if isinstance(additional, Mapping) else {}
    try:
        return PluginConfig.model_validate(given)
    except ValidationError as error:
        raise ValueError("; ".join(_described(error))) from None


def _described(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where = ".".join([MEMBER, *(str(part) for part in item["loc"])])
        if item["type"] == "extra_forbidden":
            lines.append(f"--additional-config: {where} is not a setting of the plug-in")
        else:
            lines.append(f"--additional-config: {where} is {item['input']!r}: {item['msg']}")
    return lines
