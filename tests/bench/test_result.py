"""What a measurement says of itself."""

from __future__ import annotations

import sys

import pytest

from penstock.bench.result import command_line


def test_the_command_line_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/penstock", "bench", "--lengths", "my file.csv"])
    assert command_line() == "penstock bench --lengths 'my file.csv'"
