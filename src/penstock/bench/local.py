"""A ``penstock serve`` of one's own: started on a free port, waited for, stopped for certain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx

_GRACE = 10.0


class ServeError(RuntimeError):
    """The server did not start; the message ends with what it said last."""


@contextmanager
def serve(arguments: Sequence[str], *, timeout: float = 120.0) -> Iterator[str]:
    """Run ``penstock serve`` with these arguments; yields its address once it is ready.

    ``PENSTOCK_...`` variables of the environment are not passed on: what is measured is what
    the arguments say.

    Raises:
        ServeError: it ended or was not ready within ``timeout`` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "penstock.cli", "serve", *arguments]
    command += ["--port", str(port), "--drain-seconds", "0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
    with running("penstock serve", command, environment, f"{url}/ready", timeout):
        yield url


@contextmanager
def running(
    name: str, command: Sequence[str], environment: Mapping[str, str], ready: str, timeout: float
) -> Iterator[None]:
    """Run a server from when the address ``ready`` answers well.

    Args:
        name: what a message calls it.

    Raises:
        ServeError: it ended or was not ready within ``timeout`` seconds.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
        try:
            _wait(name, process, ready, timeout, said)
            yield
        finally:
            _stop(process)


def _wait(
    name: str, process: subprocess.Popen[bytes], ready: str, timeout: float, said: IO[str]
) -> None:
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        if process.poll() is not None:
            break
        try:
            if httpx.get(ready, timeout=1.0).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    state = "was not ready in time" if process.poll() is None else f"ended ({process.returncode})"
    said.seek(0)
    last = "\n".join(said.read().splitlines()[-15:])
    msg = f"{name} {state}; it said:\n{last}"
    raise ServeError(msg)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def revision(folder: Path) -> str:
    """The commit of a checkout, with ``-dirty`` if it has changes; ``unknown`` outside of one."""
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit
