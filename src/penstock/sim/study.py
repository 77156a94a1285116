"""The behaviour study of the Past-Future paper: steps without times, and what it counts.

Problem: how a policy uses memory, and whom it evicts, is a matter of steps; a study that counts
steps compares policies without any machine.

Source: Past-Future (arXiv 2507.10150) and the simulator in its authors' artifact.  From the latter:
all requests wait from the start; the history of past lengths begins with half a window of 512;
outputs may exceed the cap that policies are told; numbers are taken until nobody waits any more;
and who is admitted but does not fit is evicted at once, see :class:`PromptWatermark` and
:class:`Overbooked`.

Limits: the last batch, after nobody waits, says nothing about admission and is not counted, so
``decode_steps`` is less than the steps until all have finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from penstock.core.forecast.occupancy import peak
from penstock.core.memory import blocks_for
from penstock.core.policies import presets
from penstock.core.policies.admit.aggressive import Aggressive
from penstock.core.policies.admit.conservative import Conservative
from penstock.core.policies.base import ADMIT, Admit, Answer, Defer, Judge, Policy
from penstock.core.snapshot import Candidate, Ints, Snapshot
from penstock.core.types import Ended, RequestId
from penstock.sim.run import Job, Run
from penstock.sim.sources import first_try

COLD_START = 512
"""Output length that the artifact's simulator assumes before anything has ended."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the study counts, until nobody waits any more.

    Attributes:
        decode_steps: steps in which someone decoded, of all instances.
        memory: mean share of the KV memory in use over those.
        peak: mean true future peak over those, as a share of the capacity: the memory that the
            running requests would need at most if each ran to its true end and nobody joined.
    """

    decode_steps: int
    memory: float
    peak: float


@dataclass(frozen=True, slots=True)
class PromptWatermark:
    """Aggressive admission as the artifact's simulator has it: evicted outputs are overlooked.

    Problem: the study's numbers of evictions need its baseline, and that lets requests in for which
    there is no room.

    Source: the simulator in the Past-Future authors' artifact.

    Rule: admit while used + prompt < watermark * capacity.  One that was evicted counts with its
    prompt alone.  If there is then no room for what it had generated, and for one token more, it
    is evicted at once; that counts as an eviction, once per pass.

    Limits: for the study only: no engine would start what does not fit.

    Attributes:
        watermark: share of the capacity that prompts may fill, in (0, 1].
        bounced: by request, how often it was evicted at once.
    """

    watermark: float = 0.99
    bounced: Counter[RequestId] = field(default_factory=Counter)

    holds = 1  # it bounces again in the next pass

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        used = view.used
        limit = self.watermark * view.capacity

        def answer(candidate: Candidate) -> Answer:
            nonlocal used
            prompt = blocks_for(candidate.request.prompt_tokens, view.block_size)
            if used + prompt >= limit:
                return Defer(
                    f"KV memory: {used} blocks used and a prompt of {prompt} "
                    f"are not below the watermark's {limit:.0f}"
                )
            most = used + blocks_for(candidate.tokens + 1, view.block_size)
            used += candidate.blocks
            if most > view.capacity:
                self.bounced[candidate.request.id] += 1
                return Defer(f"KV memory: {most} blocks do not fit {view.capacity}")
            return ADMIT

        return answer

    def observe(self, ended: Ended) -> None:
        """Nothing to learn."""

    def learn_true_length(self, request_id: str, length: int) -> None:
        """Not for this policy."""


@dataclass(frozen=True, slots=True)
class Overbooked:
    """Conservative admission as the artifact's simulator has it when caps are over-committed.

    Problem, source and limits: as for :class:`PromptWatermark`.

    Rule: whom the reservation admits is started even if there is no room for it and one token
    more; then it is evicted at once, which counts as an eviction, once per pass.  So are all those
    behind it whom the reservation admits in the same pass.

    Attributes:
        reserve: the rule that admits.
        jobs: by request, all that may ever wait; one that is tried again is the same.
        bounced: by request, how often it was evicted at once.
    """

    reserve: Conservative
    jobs: Mapping[RequestId, Job] = field(default_factory=dict)
    bounced: Counter[RequestId] = field(default_factory=Counter)
    _line: list[RequestId] = field(default_factory=list)
    _ended: set[RequestId] = field(default_factory=set)

    holds = 1  # it bounces again in the next pass

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        reserve = self.reserve.judge(view)
        used = view.used
        started: list[RequestId] = []

        def answer(candidate: Candidate) -> Answer:
            nonlocal used
            said = reserve(candidate)
            if not isinstance(said, Admit):
                return said
            most = used + blocks_for(candidate.tokens + 1, view.block_size)
            used += candidate.blocks
            if most > view.capacity:
                self.bounced[candidate.request.id] += 1
                self._bounce_behind(candidate, reserve, {*view.columns.ids, *started})
                return Defer(f"KV memory: {most} blocks do not fit {view.capacity}")
            started.append(candidate.request.id)
            return said

        return answer

    def _bounce_behind(self, first: Candidate, reserve: Judge, holding: set[RequestId]) -> None:
        """Count those behind this one whom the reservation lets in too, with no room for them."""
        for name in self._line[first.seq + 1 :]:
            if name in holding or name in self._ended:
                continue
            job = self.jobs[first_try(name)]
            request = replace(first.request, id=name, prompt_tokens=job.prompt, cap=job.cap)
            if not isinstance(reserve(first._replace(request=request)), Admit):
                return
            self.bounced[name] += 1

    def observe(self, ended: Ended) -> None:
        """One that waits no more."""
        self._ended.add(ended.id)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """One that waits from now on; its length is not for this policy."""
        del length
        self._line.append(request_id)


def study_policy(preset: str, *, seed: int, period: int | None = None, **parameters: Any) -> Policy:
    """A preset as the study has it: with the artifact's cold start and watermark.

    Raises:
        ValueError: see :func:`penstock.core.policies.presets.build`.
    """
    known = presets.PRESETS.get(preset)
    if known is not None and "cold_start" in known.parameters:
        parameters.setdefault("cold_start", COLD_START)
    policy = presets.build(preset, seed=seed, period=period, **parameters)
    if isinstance(policy.admit, Aggressive):
        return replace(policy, admit=PromptWatermark(policy.admit.watermark))
    if isinstance(policy.admit, Conservative) and policy.admit.over_commit > 1:
        return replace(policy, admit=Overbooked(policy.admit))
    return policy


def with_jobs(policy: Policy, jobs: Sequence[Job]) -> Policy:
    """The policy, told who is going to wait, where the study's counts need it."""
    if isinstance(policy.admit, Overbooked):
        return replace(policy, admit=replace(policy.admit, jobs={job.id: job for job in jobs}))
    return policy


def count_bounces(run: Run, policy: Policy) -> Run:
    """The run with those evicted at once among its evictions."""
    if not isinstance(policy.admit, PromptWatermark | Overbooked) or not policy.admit.bounced:
        return run
    bounced = policy.admit.bounced
    records = [
        record._replace(
            ended=record.ended._replace(evictions=record.ended.evictions + bounced[record.job.id])
        )
        for record in run.records
    ]
    return replace(run, records=records, evictions=run.evictions + bounced.total())


def behaviour_of(runs: Sequence[Run], kv_tokens: int) -> Behaviour:
    """The study's numbers of instances: steps in all, and means over all of those.

    Args:
        runs: of each instance, with steps as the unit of time.
        kv_tokens: of each.
    """
    parts = [behaviour(run, kv_tokens) for run in runs]
    steps = sum(part.decode_steps for part in parts)
    if len(parts) == 1 or not steps:
        return parts[0]
    memory = sum(part.decode_steps * part.memory for part in parts) / steps
    return Behaviour(steps, memory, sum(p.decode_steps * p.peak for p in parts) / steps)


def behaviour(run: Run, kv_tokens: int) -> Behaviour:
    """Take the study's numbers of a run whose steps are the unit of time."""
    spans = _spans(run)
    if not len(spans):
        return Behaviour(0, 0.0, 0.0)
    # Where nobody ever waits, all of the run counts.
    steps = int(spans[:, 0].max()) - 1 or int(spans[:, 1].max())
    first, last, tokens, left = spans[spans[:, 0] <= steps].T
    count = np.minimum(last, steps) - first + 1
    held = int((count * tokens + count * (count - 1) // 2).sum())
    moments = np.unique(np.concatenate(([1], first, last + 1, [steps + 1])))
    moments = moments[moments <= steps + 1]
    peaks = _peaks(first, last, tokens, left, moments)
    whole = steps * kv_tokens
    return Behaviour(steps, held / whole, float(peaks @ np.diff(moments)) / whole)


def _spans(run: Run) -> Ints:
    """Uninterrupted decoding as rows (first tick, last tick, KV tokens in the first, steps left).

    Steps left are those after the first until the request's true end.
    """
    rows = []
    for record in run.records:
        job, generated = record.job, 0
        for stretch in record.track.stretches:
            generated += stretch.sampled_at is not None
            count = stretch.last - stretch.first + 1
            if count > 0:
                left = job.output - generated - 1
                rows.append((stretch.first, stretch.last, job.prompt + generated, left))
                generated += count
    return np.array(rows, dtype=np.int64)


def _peaks(first: Ints, last: Ints, tokens: Ints, left: Ints, moments: Ints) -> Ints:
    """The true future peak at each moment but the last; it is constant between two of them."""
    order = np.argsort(first, kind="stable")
    bounds = np.searchsorted(first[order], moments, side="right").tolist()
    running: list[int] = []
    peaks = np.zeros(len(moments) - 1, dtype=np.int64)
    joined = 0
    for i, moment in enumerate(moments[:-1].tolist()):
        running = [row for row in running if last[row] >= moment]
        running.extend(order[joined : bounds[i]].tolist())
        joined = bounds[i]
        if running:
            rows = np.array(running)
            past = moment - first[rows]
            peaks[i] = peak(tokens[rows] + past, left[rows] - past)
    return peaks
