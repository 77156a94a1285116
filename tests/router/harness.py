"""A real router in a process of its own."""

from __future__ import annotations

import sys

from tests.server.harness import Server


class Router(Server):
    """``penstock route`` on a free port; leaving the context stops it and checks that it can."""

    def __init__(self, *backends: str, flags: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._command = [
            *(sys.executable, "-W", "error", "-m", "penstock.cli", "route", "--port", "0"),
            *(word for url in backends for word in ("--backend", url)),
            *flags,
        ]
