"""The demo's plans name what the comparison can show."""

from __future__ import annotations

import pytest

from penstock.bench.compare import COLORS, NAMES
from penstock.bench.demo import FULL, QUICK, Plan
from penstock.core.policies import presets


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_every_preset_of_a_plan_can_be_run_and_shown(plan: Plan) -> None:
    wanted = set(plan.presets)
    assert wanted <= presets.PRESETS.keys()
    assert wanted <= NAMES.keys()
    assert wanted <= COLORS.keys()
