"""Pauses that end while a plan is being made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.policies import presets
from penstock.core.policies.share.static import StaticShare
from penstock.core.snapshot import Decoding, Ints
from penstock.core.types import Capabilities
from tests.core.drive import capabilities
from tests.core.hand import Hand


@dataclass
class LongestAlone:
    """Once told to, lets only the request with the longest context decode."""

    pausing: bool = False

    def choose(self, decoding: Decoding, now: float) -> Ints | None:
        del now
        return np.array([int(decoding.context.argmax())]) if self.pausing else None

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Nothing to learn."""

    def ended(self, tokens: int) -> None:
        """Nothing to learn."""


def test_prompts_that_nobody_has_hold_up_nobody() -> None:
    """A static share waits for all to decode, of whom some pause for as long as others do."""
    policy = replace(presets.build("vllm"), pack=LongestAlone(pausing=True), share=StaticShare())
    hand = Hand(capabilities(max_batch=3), policy)
    for name, prompt in (("a", 3), ("b", 2), ("c", 1)):
        hand.add(name, prompt, 4)
    for _ in range(30):
        if hand.scheduler.stats(0.0).running or hand.scheduler.stats(0.0).waiting:
            hand.plan()
            hand.confirm()
    assert {ended.output_tokens for ended in hand.ended.values()} == {4}
    assert len(hand.ended) == 3


def test_those_whose_pause_an_eviction_ends_count_in_the_step() -> None:
    """Two pause, the third is evicted, so the two decode: that leaves less for the prompt."""
    pack = LongestAlone()
    policy = replace(presets.build("vllm", watermark=1.0, order="priority"), pack=pack)
    capabilities = Capabilities(
        kv_blocks=14, block_size=1, max_batch=3, max_step_tokens=3, max_request_tokens=12
    )
    hand = Hand(capabilities, policy)
    hand.add("a", 1, 8)
    hand.add("b", 1, 8)
    hand.add("c", 4, 8, priority=1)
    resumed = False
    for _ in range(60):
        plan = hand.plan()
        assert plan is not None
        assert plan.tokens <= capabilities.max_step_tokens
        resumed |= bool(plan.drops) and len(plan.decode) == 2
        hand.confirm()
        if plan.number == 4:
            hand.add("d", 4, 8)
        pack.pausing |= {"a", "b"} <= set(plan.decode)
        if not hand.scheduler.stats(0.0).running and not hand.scheduler.stats(0.0).waiting:
            break
    assert resumed
