"""Validation against a measured run: the same arrivals and lengths through the simulator.

Problem: a simulator is believed at one's own risk until it has predicted something measured.
Source: our own; the runs are those of casys-kaist/LLMServingSim's validation of vLLM.
Rule: replay the run's requests through the production scheduler with preset ``vllm``, with step
times from a profile of the model's layers and one constant of host time per step.  The constant is
what makes the mean end-to-end time of the first requests right; the others are predicted.  With
tensor parallelism a second constant stands for the all-reduce, which grows with the tokens of a
step and is in no table of kernels: the one that explains the first requests best.
Limits: what vLLM does beyond scheduling and kernels (tokenizing, streaming) is in the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies import presets
from penstock.core.types import Capabilities
from penstock.sim.layer_table import LayerTable
from penstock.sim.measured import MeasuredRequest
from penstock.sim.pipelined import Pipelined
from penstock.sim.run import Job, Run, run
from penstock.sim.sources import OpenLoop

Floats = NDArray[np.float64]
_LEAST_HOST, _MOST_HOST = 0.001, 0.5  # seconds per step, far beyond any server's
_MOST_LINK = 5e-4  # seconds per token: 2,048 tokens take a second
_PRECISE = 1e-6
_FINE = 0.005


class Hosted(LatencyModel, Protocol):
    """A latency model with a constant of host time.

    Attributes:
        least_host: the least constant that it can have, in seconds.
    """

    @property
    def least_host(self) -> float:
        """See the class."""
        ...

    def with_host(self, seconds: float) -> Hosted:
        """The same with another constant, in seconds per step."""
        ...


@dataclass(frozen=True, slots=True)
class Server:
    """What served the run.

    Attributes:
        kv_tokens: KV memory, in tokens; blocks of ``block_size``.
        max_batch: most requests in a step.
        max_step_tokens: most tokens in a step.
        parallel: GPUs that share each layer.
        depth: steps that are planned or run at a time: 2 where planning overlaps with computing.
        prefix_cache: whether an evicted request finds again what nobody has overwritten.
    """

    kv_tokens: int
    block_size: int = 16
    max_batch: int = 256
    max_step_tokens: int = 2048
    parallel: int = 1
    depth: int = 2
    prefix_cache: bool = True

    @property
    def room(self) -> int:
        """KV tokens in whole blocks."""
        return self.kv_tokens // self.block_size * self.block_size


class Errors(msgspec.Struct, frozen=True):
    """Predicted over measured, minus 1, for the requests that were not calibrated on.

    ``ttft_mean``, ``tpot_mean`` and ``e2e_mean`` are of the means and signed;
    ``e2e_per_request`` is the mean absolute error of single requests.
    """

    ttft_mean: float
    tpot_mean: float
    e2e_mean: float
    e2e_per_request: float


class Validation(msgspec.Struct, frozen=True):
    """What came of a validation; seconds.

    Attributes:
        host, link: time per step, and per token, that was calibrated.
        calibrated_on, predicted: numbers of requests.
        measured, simulated: mean ttft, tpot and e2e of the predicted requests.
        calibration: errors on the requests that were calibrated on.
        evictions: in the simulation.
    """

    host: float
    link: float
    calibrated_on: int
    predicted: int
    errors: Errors
    calibration: Errors
    measured: dict[str, float]
    simulated: dict[str, float]
    evictions: int


def validate(
    requests: Sequence[MeasuredRequest],
    server: Server,
    model: Hosted,
    calibrate_on: int,
) -> Validation:
    """Calibrate on the first requests, predict the others.

    Args:
        requests: in order of arrival.
        server: what served them.
        model: step times; a :class:`LayerTable` gets a link time if ``server`` is parallel.
        calibrate_on: how many requests.

    Raises:
        ValueError: too few requests on either side, or one that can never fit.
    """
    if not 0 < calibrate_on < len(requests):
        msg = f"calibrate_on is {calibrate_on}; it must be from 1 to {len(requests) - 1} requests"
        raise ValueError(msg)
    for r in requests:
        if r.prompt + r.output - 1 > server.room:
            msg = (
                f"line {r.line} of the run: input_toks ({r.prompt}) and output_toks ({r.output}) "
                f"can never fit kv_tokens ({server.kv_tokens}) in blocks of {server.block_size}"
            )
            raise ValueError(msg)
    if server.parallel == 1 or not isinstance(model, LayerTable):
        return _with_host(requests, server, model, calibrate_on, _PRECISE)
    table = model

    def misfit(link: float) -> float:
        done = _with_host(requests, server, table.with_link(link), calibrate_on, 10 * _PRECISE)
        return done.calibration.e2e_per_request

    link = _lowest(misfit, _MOST_LINK)
    done = _with_host(requests, server, table.with_link(link), calibrate_on, _PRECISE)
    return msgspec.structs.replace(done, link=link)


def _with_host(
    requests: Sequence[MeasuredRequest],
    server: Server,
    model: Hosted,
    calibrate_on: int,
    precise: float,
) -> Validation:
    """The validation with the host time that makes the first requests' mean right."""
    first, rest = slice(0, calibrate_on), slice(calibrate_on, None)
    real = np.array([(r.ttft, r.tpot, r.e2e) for r in requests])
    wanted = float(real[first, 2].mean())

    def replayed(host: float) -> tuple[Floats, Run]:
        done = _replay(requests, server, model.with_host(host))
        return _times(done, len(requests)), done

    def too_short(host: float) -> bool:
        return float(replayed(host)[0][first, 2].mean()) < wanted

    low, high = 0.0, _LEAST_HOST
    if not too_short(low):
        low, high = model.least_host, low
    while too_short(high) and high < _MOST_HOST:
        low, high = high, 2 * high
    while high - low > precise:
        middle = (low + high) / 2
        low, high = (middle, high) if too_short(middle) else (low, middle)
    times, done = replayed(low)
    return Validation(
        host=low,
        link=0.0,
        calibrated_on=calibrate_on,
        predicted=len(requests) - calibrate_on,
        errors=_errors(times[rest], real[rest]),
        calibration=_errors(times[first], real[first]),
        measured=_means(real[rest]),
        simulated=_means(times[rest]),
        evictions=done.evictions,
    )


def _lowest(value: Callable[[float], float], most: float) -> float:
    """Where a function with one valley is lowest in [0, most], by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, most
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = value(left), value(right)
    while high - low > _FINE * most:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = value(right)
    return (low + high) / 2


def _replay(requests: Sequence[MeasuredRequest], server: Server, model: LatencyModel) -> Run:
    cap = max(request.output for request in requests)
    start = requests[0].arrival
    jobs = [
        Job(
            str(i), r.arrival - start, r.prompt, r.output,
            min(cap, max(r.output, server.room - r.prompt)), request=i,
            prefix=_keys(i, r.prompt // server.block_size) if server.prefix_cache else (),
        )
        for i, r in enumerate(requests)
    ]  # fmt: skip
    machine = Capabilities(
        kv_blocks=server.room // server.block_size,
        block_size=server.block_size,
        max_batch=server.max_batch,
        max_step_tokens=max(server.max_step_tokens, server.max_batch),
        max_request_tokens=server.kv_tokens + 1,
        prefix_cache=server.prefix_cache,
    )
    # Since its version 1, vLLM admits while a block is free.
    policy = presets.build("vllm", watermark=1.0)
    source = OpenLoop(jobs) if server.depth == 1 else Pipelined(jobs)
    return run(source, machine, policy, model)


def _keys(request: int, blocks: int) -> tuple[bytes, ...]:
    """Of a prompt that is like no other's."""
    return tuple(b"%d.%d" % (request, block) for block in range(blocks))


def _times(done: Run, count: int) -> Floats:
    times = np.full((count, 3), np.nan)
    for record in done.records:
        latency = record.latency
        times[record.job.request] = (latency.ttft, latency.tpot, latency.e2e)
    return times


def _errors(predicted: Floats, real: Floats) -> Errors:
    """Not a number where nothing was measured, as TPOT of requests with one token."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ttft, tpot, e2e = _mean(predicted) / _mean(real) - 1
        each = np.abs(predicted[:, 2] / real[:, 2] - 1).mean()
    return Errors(float(ttft), float(tpot), float(e2e), float(each))


def _means(times: Floats) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        return dict(zip(("ttft", "tpot", "e2e"), map(float, _mean(times)), strict=True))


def _mean(times: Floats) -> Floats:
    """Of each column what is a number."""
    there = ~np.isnan(times)
    mean: Floats = np.where(there, times, 0.0).sum(axis=0) / there.sum(axis=0)
    return mean
