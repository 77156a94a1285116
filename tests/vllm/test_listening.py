from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from penstock.bench.local import free_port
from penstock.server.command import explain
from penstock.vllm.listening import named, serve


@pytest.mark.parametrize(
    ("answer", "request_id"),
    [
        ("cmpl-a7", "cmpl-a7-0-0123abcd"),
        ("cmpl-a7", "1_cmpl-a7-3-0123abcd"),
        ("chatcmpl-a7", "chatcmpl-a7-0123abcd"),
        ("chatcmpl-a7", "chatcmpl-a7"),
        ("resp_a7", "resp_a7_0-0123abcd"),
        ("a7", "a7"),
    ],
)
def test_an_answers_parts_are_found_by_its_id_and_by_the_clients(
    answer: str, request_id: str
) -> None:
    one: Any = SimpleNamespace(request_id=request_id)
    assert named("a7", [one]) == [one]
    assert named(answer, [one]) == [one]


@pytest.mark.parametrize("name", ["", "a", "7", "0123abcd", "cmpl", "a7-0-0", ".7", "a7x"])
def test_no_other_name_finds_them(name: str) -> None:
    one: Any = SimpleNamespace(request_id="cmpl-a7-0-0123abcd")
    assert named(name, [one]) == []


def test_penstock_explain_and_prometheus_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    registry = CollectorRegistry()
    Gauge("penstock:one", "x", registry=registry).set(3)
    choice = {"index": 0, "prompt_tokens": 4, "output_tokens": 0, "age_s": 1.5}
    standing: dict[str, list[dict[str, Any]]] = {"a b": [{**choice, "explanation": "waiting: x"}]}
    port = free_port()
    serve(port, registry, lambda name: standing.get(name, []))
    url = f"http://127.0.0.1:{port}"
    assert "penstock:one 3.0" in httpx.get(f"{url}/metrics").text
    assert explain("a b", url=url) == 0
    said = capsys.readouterr().out
    assert said == "choice 0: waiting: x (4 prompt tokens, 0 output tokens, 1.5 s old)\n"
    assert explain("gone", url=url) == 1
    assert "is not open" in capsys.readouterr().err
    gone = httpx.get(f"{url}/v1/penstock/requests/gone")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "request_not_found"
