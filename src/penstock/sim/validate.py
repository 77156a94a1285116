"""Validation against a measured run: the same arrivals and lengths through the simulator.

Problem: a simulator is believed at one's own risk until it has predicted something measured.
Source: our own; the runs are those of casys-kaist/LLMServingSim's validation of vLLM.
Rule: replay the run's requests through the production scheduler with preset ``vllm``, with step
times from a profile of the model's layers and one constant of host time per step.  The constant is
what makes the mean end-to-end time of the first requests right; the others are predicted.  With
tensor parallelism a second constant stands for the all-reduce, which grows with the tokens of a
step and is in no table of kernels: the one with which first and last tokens of the first requests
come nearest.
Limits: what vLLM does beyond scheduling and kernels (tokenizing, streaming) is in the constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from penstock.sim.search import crossing, lowest
from penstock.sim.sources import OpenLoop

Floats = NDArray[np.float64]
_MOST_HOST = 0.5  # seconds per step, far beyond any server's
_NEAR = (0.003, 0.002)
_MOST_LINK = 5e-4  # seconds per token: 2,048 tokens take a second
# Enough for host time in seconds, and for the mean end-to-end time as a share of itself.
_PRECISE, _ROUGH = (1e-6, 1e-5), (2e-5, 2e-4)
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
        misfit: of those: how far their first and last tokens are off, over the mean time to the
            last.
        evictions: in the simulation.
    """

    host: float
    link: float
    calibrated_on: int
    predicted: int
    errors: Errors
    calibration: Errors
    misfit: float
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
    trial = _Trial(requests, server, calibrate_on)
    if server.parallel == 1 or not isinstance(model, LayerTable):
        return trial.with_host(model, _PRECISE)
    table = model
    link = lowest(
        lambda link: trial.with_host(table.with_link(link), _ROUGH).misfit,
        _MOST_LINK,
        _FINE * _MOST_LINK,
    )
    done = trial.with_host(table.with_link(link), _PRECISE)
    return msgspec.structs.replace(done, link=link)


class _Trial:
    """Replays of one run, with one latency model or another."""

    def __init__(
        self, requests: Sequence[MeasuredRequest], server: Server, calibrate_on: int
    ) -> None:
        self._requests, self._server = requests, server
        self._first, self._rest = slice(0, calibrate_on), slice(calibrate_on, None)
        self._real = np.array([(r.ttft, r.tpot, r.e2e) for r in requests])
        self._near = _NEAR

    def with_host(self, model: Hosted, precise: tuple[float, float]) -> Validation:
        """The validation with the host time that makes the first requests' mean right."""
        first, rest, real = self._first, self._rest, self._real
        wanted = float(real[first, 2].mean())

        def replayed(host: float) -> tuple[Floats, Run]:
            done = _replay(self._requests, self._server, model.with_host(host))
            return _times(done, len(real)), done

        host = crossing(
            lambda host: float(replayed(host)[0][first, 2].mean()) / wanted - 1,
            (model.least_host, _MOST_HOST),
            self._near,
            precise,
        )
        self._near = (host, self._near[1])
        times, done = replayed(host)
        off = np.abs(times[first] - real[first])
        return Validation(
            host=host,
            link=0.0,
            calibrated_on=len(real[first]),
            predicted=len(real[rest]),
            errors=_errors(times[rest], real[rest]),
            calibration=_errors(times[first], real[first]),
            misfit=float(off[:, [0, 2]].mean()) / wanted,
            measured=_means(real[rest]),
            simulated=_means(times[rest]),
            evictions=done.evictions,
        )


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
    ttft, tpot, e2e = (_mean(p) / _mean(r) - 1 for p, r in zip(predicted.T, real.T, strict=True))
    each = float(np.abs(predicted[:, 2] / real[:, 2] - 1).mean())
    return Errors(ttft, tpot, e2e, each)


def _means(times: Floats) -> dict[str, float]:
    return dict(zip(("ttft", "tpot", "e2e"), map(_mean, times.T), strict=True))


def _mean(times: Floats) -> float:
    """Of those that there are; not a number if there are none."""
    known = times[~np.isnan(times)]
    return float(known.mean()) if len(known) else math.nan
