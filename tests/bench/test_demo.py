"""The demo's plans name what the comparison can show."""

from __future__ import annotations

import pytest

from penstock.bench.compare import COLORS, NAMES
from penstock.bench.demo import FULL, GAP_STEPS, QUICK, Plan
from penstock.core.policies import presets
from penstock.core.types import SLO


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_every_preset_of_a_plan_can_be_run_and_shown(plan: Plan) -> None:
    wanted = set(plan.presets)
    assert wanted <= presets.PRESETS.keys()
    assert wanted <= NAMES.keys()
    assert wanted <= COLORS.keys()


def test_a_slow_machine_gets_more_time() -> None:
    plan = Plan(("tgi",), 1.0, 1.0, 20.0, 20.0, steps=4000, most=45.0)
    steps = {seconds: SLO(gap=GAP_STEPS * seconds) for seconds in (0.003, 0.008, 0.03)}
    assert [plan.lasting(20.0, slo) for slo in steps.values()] == [20.0, 32.0, 45.0]
