"""What simulated clients saw: the load generator's records, summaries and definitions."""

from __future__ import annotations

from penstock.bench.goodput import Attempt, End, Summary, misses, summarize
from penstock.core.types import FinishReason
from penstock.sim.run import Record, Run

_ENDS = {
    FinishReason.STOP: End.COMPLETED,
    FinishReason.LENGTH: End.COMPLETED,
    FinishReason.REJECTED: End.REFUSED,
    FinishReason.EXPIRED: End.EXPIRED,
    FinishReason.CANCELLED: End.ABANDONED,
    FinishReason.FAILED: End.ERROR,
}


def attempt_of(record: Record) -> Attempt:
    """A job's end as its client saw it."""
    job, ended = record.job, record.ended
    end = _ENDS[ended.reason]
    return Attempt(
        request=job.request,
        number=job.attempt,
        slo_class=job.slo_class,
        prompt_tokens=job.prompt,
        output_tokens=ended.output_tokens,
        sent=job.arrival,
        ended=record.at,
        end=end,
        latency=record.latency,
        broken=misses(record.latency, job.slo) if end is End.COMPLETED else (),
        detail=ended.detail,
    )


def summary_of(run: Run, start: float = 0.0, stop: float | None = None) -> Summary:
    """Goodput, attainment and percentiles over the jobs that ended in (start, stop].

    Raises:
        ValueError: the window is empty.
    """
    until = run.seconds if stop is None else stop
    return summarize(map(attempt_of, run.records), start, until)
