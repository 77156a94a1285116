"""From what a probe saw to samples of step times."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import Sample
from penstock.sim.profiling.probes import ProbeError, Seen, Stream

_TRIM = 0.1


def decode_samples(seen: Seen) -> list[Sample]:
    """One sample for each window in which nothing but decoding went on.

    It is the mean over the window's steps without the tenth at either end, so that a single
    hiccup does not count.

    Raises:
        ProbeError: a window has no steps.
    """
    samples = []
    for begin, end in seen.windows:
        steps: list[float] = []
        contexts = [0.0] * len(seen.streams)
        for index, stream in enumerate(seen.streams):
            inside = [k for k in range(1, len(stream.answer.arrivals))
                      if begin <= stream.answer.arrivals[k - 1]
                      and stream.answer.arrivals[k] <= end]  # fmt: skip
            steps += [_step(stream, k) for k in inside]
            # The step that brings token k (counted from 0) attends to the prompt and k tokens.
            contexts[index] = stream.prompt + (float(np.mean(inside)) if inside else 0.0)
        if not steps:
            msg = f"{len(seen.streams)} streams brought no tokens in {end - begin:.2f} s"
            raise ProbeError(msg)
        load = StepLoad(
            decoding=len(contexts), context=round(sum(contexts)), longest=round(max(contexts))
        )
        samples.append(Sample(load, _trimmed(steps)))
    return samples


def join_samples(seen: Seen, budget: int) -> list[Sample]:
    """One sample for each step that computed (part of) a prompt while the streams decoded.

    Repeats of the same prompt length are one sample, the median of their times.

    Args:
        budget: most tokens that the endpoint computes in a step.
    """
    room = budget - len(seen.streams)
    found: dict[tuple[int, int], list[tuple[StepLoad, float]]] = {}
    for joined in seen.joined:
        for number, load, seconds in _steps_of(seen, joined, room):
            found.setdefault((joined.prompt, number), []).append((load, seconds))
    return [
        Sample(rows[len(rows) // 2][0], float(np.median([seconds for _, seconds in rows])))
        for rows in found.values()
    ]


def _steps_of(seen: Seen, joined: Stream, room: int) -> Iterator[tuple[int, StepLoad, float]]:
    """The steps that computed a prompt: number, load, seconds as the median stream saw it."""
    at = joined.answer.arrivals[0]
    count = -(-joined.prompt // room)
    ends = [int(np.abs(np.asarray(s.answer.arrivals) - at).argmin()) for s in seen.streams]
    for number in range(count):
        back = count - 1 - number
        last = [end - back for end in ends]
        if min(last) < 1:
            return
        pairs = list(zip(seen.streams, last, strict=True))
        contexts = [stream.prompt + k for stream, k in pairs]
        start = number * room
        tokens = min(room, joined.prompt - start)
        load = StepLoad(
            decoding=len(contexts),
            context=sum(contexts),
            prefill=tokens,
            prefill_work=tokens * (start + tokens / 2),
            chunks=1,
            longest=max(contexts),
        )
        yield number, load, float(np.median([_step(stream, k) for stream, k in pairs]))


def _step(stream: Stream, k: int) -> float:
    return float(stream.answer.arrivals[k] - stream.answer.arrivals[k - 1])


def _trimmed(values: list[float]) -> float:
    ordered = np.sort(values)
    cut = int(len(ordered) * _TRIM)
    return float(ordered[cut : len(ordered) - cut].mean())
