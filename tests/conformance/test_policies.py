"""The conformance kit over everything that is registered, and over policies that must fail it."""

from __future__ import annotations

from itertools import cycle

import pytest

from penstock.core.policies import presets
from penstock.core.policies.admit.aggressive import Aggressive
from penstock.core.policies.base import (
    Admit,
    Answer,
    Defer,
    Judge,
    OrderKey,
    PackPolicy,
    Split,
)
from penstock.core.snapshot import Candidate, Columns, Snapshot
from penstock.core.types import Ended, Request
from tests.conformance.policy_kit import (
    check_admit_policy,
    check_composition,
    check_order_policy,
    check_pack_policy,
    check_rank_policy,
    check_share_policy,
    check_victim_policy,
)

NAMES = sorted(presets.PRESETS)
ORACLES = {"oracle"}
# The presets that give these answers to "share" and "victim", by the answers' names.
SHARES = {type(presets.build(name).share).__name__: name for name in NAMES}
PACKING = {preset.pack: name for name, preset in presets.PRESETS.items() if preset.pack}
VICTIMS = {type(presets.build(name).victim).__name__: name for name in NAMES}


@pytest.mark.parametrize("name", sorted(presets.ORDERS))
def test_order(name: str) -> None:
    check_order_policy(presets.ORDERS[name])


@pytest.mark.parametrize("name", sorted(presets.RANKS))
def test_rank(name: str) -> None:
    check_rank_policy(presets.RANKS[name])


@pytest.mark.parametrize("name", sorted(PACKING))
def test_pack(name: str) -> None:
    def make() -> PackPolicy:
        made = presets.build(PACKING[name]).pack
        assert made is not None
        return made

    check_pack_policy(make)


@pytest.mark.parametrize("name", NAMES)
def test_admit(name: str) -> None:
    check_admit_policy(
        lambda seed: presets.build(name, seed=seed).admit, sees_true_lengths=name in ORACLES
    )


@pytest.mark.parametrize("name", sorted(SHARES))
def test_share(name: str) -> None:
    check_share_policy(lambda: presets.build(SHARES[name]).share)


@pytest.mark.parametrize("name", sorted(VICTIMS))
def test_victim(name: str) -> None:
    check_victim_policy(lambda: presets.build(VICTIMS[name]).victim)


@pytest.mark.parametrize("name", NAMES)
def test_composition(name: str) -> None:
    check_composition(lambda: presets.build(name, seed=1))


def test_who_sees_true_lengths_says_so_in_its_name() -> None:
    with pytest.raises(AssertionError, match="true lengths change its answers"):
        check_admit_policy(lambda seed: presets.build("oracle", seed=seed).admit)


WHIMS = cycle([0.5, 1.0])


class Wrong:
    """An aggressive admission policy with a fault to order."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.holds = 1 if fault == "upside down" else None
        self.watermark = next(WHIMS) if fault == "moody" else 0.9

    def judge(self, view: Snapshot) -> Judge:
        there = view.columns
        if self.fault == "writes":
            there.generated.flags.writeable = True
            there.generated[:] += 1
        inner = Aggressive(self.watermark).judge(view)

        def answer(one: Candidate) -> Answer:
            if self.fault == "upside down":
                return Admit() if isinstance(inner(one), Defer) else Defer("there is room")
            if self.fault == "mute" and isinstance(inner(one), Defer):
                return Defer("")
            if self.fault == "forgets" and len(there) and there.generated.max() > 30:
                return Admit()
            return inner(one)

        return answer

    def observe(self, ended: Ended) -> None:
        """Nothing to learn."""

    def learn_true_length(self, request_id: str, length: int) -> None:
        if self.fault == "peeks":
            self.watermark = 0.01 * length / len(request_id)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("writes", "it changed what it looked at"),
        ("upside down", "room"),
        ("mute", "a refusal must say why"),
        ("forgets", "steps later"),
        ("moody", "same seed, other answers"),
        ("peeks", "true lengths change its answers"),
    ],
)
def test_the_kit_finds_an_admission_policy_with_a_fault(fault: str, message: str) -> None:
    check_admit_policy(lambda _: Wrong())
    with pytest.raises(AssertionError, match=message):
        check_admit_policy(lambda _: Wrong(fault))


def test_the_kit_finds_an_order_that_puts_the_latest_first() -> None:
    class Lifo:
        def key(self, request: Request) -> OrderKey:
            return (-request.arrival,)

    with pytest.raises(AssertionError, match="who arrives later must not come first"):
        check_order_policy(Lifo)


@pytest.mark.parametrize(("decode", "prefill"), [(True, 101), (False, 0), (True, -1)])
def test_the_kit_finds_a_share_out_of_range(*, decode: bool, prefill: int) -> None:
    class Fixed:
        steady = True

        def split(self, view: Snapshot, max_step_tokens: int) -> Split:
            del view, max_step_tokens
            return Split(decode, prefill)

    with pytest.raises(AssertionError):
        check_share_policy(Fixed)


def test_the_kit_finds_a_victim_that_is_not_there() -> None:
    class Beyond:
        def choose(self, running: Columns) -> int:
            return len(running)

    with pytest.raises(AssertionError, match=r"row \d+ of \d+"):
        check_victim_policy(Beyond)
