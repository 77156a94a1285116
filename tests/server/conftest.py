"""Servers that many tests share."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.harness import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server with the scripted engine."""
    with Server("--trace-lengths", "--max-request-tokens", "4096") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
