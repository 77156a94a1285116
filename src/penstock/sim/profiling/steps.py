"""Samples from recorded steps: some to fit, some held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from penstock.core.forecast.latency.fit import Sample
from penstock.sim.recording import StepRecord

_BLOCK = 50
_HELD_OUT = 5


def samples_of(steps: Sequence[StepRecord]) -> list[Sample]:
    """Whole steps, host time included.

    A step that an idle engine began gets the median host time of the others.
    """
    hosts = [step.host for step in steps if step.host is not None]
    usual = median(hosts) if hosts else 0.0
    return [
        Sample(step.load, step.seconds + (usual if step.host is None else step.host))
        for step in steps
    ]


def split(samples: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    """To fit, and held out: every fifth block of fifty, as neighbours are alike."""
    fitted: list[Sample] = []
    held: list[Sample] = []
    for index, sample in enumerate(samples):
        (held if index // _BLOCK % _HELD_OUT == _HELD_OUT - 1 else fitted).append(sample)
    return fitted, held
