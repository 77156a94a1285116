"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# OpenMP's threads wait for each other by spinning.  With another job on the machine that makes two
# threads many times slower than one, and the models here are too small to gain from two.
# Engine processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# CI machines are slow and shared: a deadline per example would fail on noise alone, and
# examples that differ from run to run would make a red build hard to repeat.
settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
