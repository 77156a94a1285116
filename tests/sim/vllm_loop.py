"""vLLM's loop written down a second time, on its own, to compare the production scheduler with.

From what vLLM documents of its V1 scheduler: those in service get one token each, or a chunk, in
order of admission; who needs a block that is not there makes the last one admitted leave, who is
computed anew; only if nobody had to leave, the queue is let in while places, tokens of the step and
blocks for all that a request has so far are there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.sim.run import Job


@dataclass
class Row:
    """A request in the loop."""

    job: Job
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    stamps: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Prompt and output so far."""
        return self.job.prompt + self.generated


class Loop:
    """One engine."""

    def __init__(self, blocks: int, block_size: int, places: int, step_tokens: int) -> None:
        self.free, self.block_size = blocks, block_size
        self.places, self.step_tokens = places, step_tokens
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.preemptions = 0

    def run(self, jobs: Sequence[Job], model: LatencyModel) -> dict[str, list[float]]:
        """The times of each job's tokens."""
        coming, rows = deque(Row(job) for job in jobs), list[Row]()
        now = 0.0
        while coming or self.waiting or self.running:
            while coming and coming[0].job.arrival <= now:
                rows.append(coming.popleft())
                self.waiting.append(rows[-1])
            planned = self._plan()
            if not planned:
                now = coming[0].job.arrival
                continue
            now += model.seconds(_load(planned))
            for row, tokens in planned:
                self._computed(row, tokens, now)
        return {row.job.id: row.stamps for row in rows}

    def _plan(self) -> list[tuple[Row, int]]:
        planned: list[tuple[Row, int]] = []
        left, before, index = self.step_tokens, self.preemptions, 0
        while index < len(self.running) and left:
            row = self.running[index]
            tokens = min(row.tokens - row.computed, left)
            while not self._grow(row, row.computed + tokens):
                last = self.running.pop()
                self.free += last.blocks
                last.blocks = last.computed = 0
                self.waiting.appendleft(last)
                self.preemptions += 1
                if last is row:
                    break
            else:
                planned.append((row, tokens))
                left -= tokens
                index += 1
        while self.preemptions == before and self.waiting and left:
            row = self.waiting[0]
            if len(self.running) == self.places or self._blocks(row.tokens) > self.free:
                break
            tokens = min(row.tokens, left)
            self._grow(row, tokens)
            self.running.append(self.waiting.popleft())
            planned.append((row, tokens))
            left -= tokens
        return planned

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _grow(self, row: Row, tokens: int) -> bool:
        more = max(0, self._blocks(tokens) - row.blocks)
        if more > self.free:
            return False
        self.free -= more
        row.blocks += more
        return True

    def _computed(self, row: Row, tokens: int, now: float) -> None:
        row.computed += tokens
        if row.computed < row.tokens:
            return
        row.generated += 1
        row.stamps.append(now)
        if row.generated == row.job.output:
            self.running.remove(row)
            self.free += row.blocks


def _load(planned: list[tuple[Row, int]]) -> StepLoad:
    decoding = context = prefill = chunks = 0
    work = 0.0
    for row, tokens in planned:
        if row.generated and row.computed == row.tokens - 1:
            decoding, context = decoding + 1, context + row.tokens
        else:
            prefill, chunks = prefill + tokens, chunks + 1
            work += tokens * (row.computed + tokens / 2)
    return StepLoad(decoding, context, prefill, work, chunks)
