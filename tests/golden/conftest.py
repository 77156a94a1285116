"""``pytest tests/golden --update-golden`` writes the recorded schedules anew."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="record the golden schedules anew"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to record instead of comparing."""
    return bool(request.config.getoption("--update-golden", default=False))
