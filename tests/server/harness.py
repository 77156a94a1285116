"""A real server in a process of its own, for tests to talk to and to mistreat."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


class Server:
    """``penstock serve`` on a free port; leaving the context stops it and checks that it can."""

    def __init__(self, *flags: str, engine: str = "scripted", model: str = "demo") -> None:
        self._command = [
            *(sys.executable, "-W", "error", "-m", "penstock.cli", "serve", model),
            *("--engine", engine, "--port", "0", *flags),
        ]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on leaving
        self._process: subprocess.Popen[str] | None = None
        self.url = ""
        self.status: int | None = None

    def __enter__(self) -> Self:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        environment["PYTHONPATH"] = str(ROOT / "src")
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = re.search(r"http://\S+:\d+", line)
        assert match, f"the server did not start: {line!r}\n{self.log}"
        self.url = match[0]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, trace
        with contextlib.closing(self._log):
            if self.status is None:
                self.stop()
            if error is None:
                assert self.status == 0, self.log
                assert "Traceback" not in self.log, self.log

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    @property
    def engine_pid(self) -> int:
        """The engine process: the front end's only child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def terminate(self) -> None:
        """Ask it to stop, without waiting."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout: float = 20.0) -> int:
        """Ask it to stop and wait; returns the exit status."""
        assert self._process is not None
        self.terminate()
        try:
            self.status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.status = self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self.status

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[openai.OpenAI]:
        options = {"api_key": "none", "max_retries": 0, "timeout": 30.0, **options}
        with openai.OpenAI(base_url=f"{self.url}/v1", **options) as client:
            yield client

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60.0
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10.0)

    def post(
        self, path: str, body: object, headers: Mapping[str, str | bytes] | None = None
    ) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=30.0)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.get("/stats").json()
        return stats

    def metric(self, name: str) -> float:
        """Sum of a metric's samples, over all labels."""
        text = self.get("/metrics").text
        found = re.findall(rf"^penstock:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        # A labelled series has no samples before the first event, but its name is there.
        assert f"# HELP penstock:{name.removesuffix('_total')}" in text or found, f"no {name}"
        return sum(map(float, found))


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


@contextlib.contextmanager
def blocked(server: Server) -> Iterator[None]:
    """Keep one place of the batch taken; on leaving, that client hangs up."""
    running = server.stats()["running"]
    body = long_completion(6000, stream=True)
    with (
        httpx.Client(timeout=30) as http,
        http.stream("POST", f"{server.url}/v1/completions", json=body),
    ):
        wait_until(lambda: server.stats()["running"] == running + 1)
        yield


def long_completion(tokens: int, **extra: Any) -> dict[str, Any]:
    """A completion request that lasts; needs ``--trace-lengths``."""
    return {
        "model": "demo",
        "prompt": "Water flows down the pipe",
        "max_tokens": tokens,
        "trace_output_tokens": tokens,
        **extra,
    }


def penstock(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "penstock.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
