from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from penstock.bench.local import free_port
from penstock.server.command import explain
from penstock.vllm.listening import named, serve, stand


def request(request_id: str, **extra_args: object) -> Any:
    return SimpleNamespace(
        request_id=request_id, sampling_params=SimpleNamespace(extra_args=extra_args)
    )


@pytest.mark.parametrize(
    ("answer", "request_id"),
    [
        ("cmpl-a7", "cmpl-a7-0-0123abcd"),
        ("cmpl-a7", "1_cmpl-a7-3-0123abcd"),
        ("chatcmpl-a7", "chatcmpl-a7-0123abcd"),
        ("chatcmpl-a7", "chatcmpl-a7"),
        ("chatcmpl-a7", "chatcmpl-a7_3-0123abcd"),
        ("cmpl-a7", "cmpl-a7-0-12345678"),
        ("chatcmpl-a7", "chatcmpl-a7-12345678"),
        ("resp_a7", "resp_a7_0-0123abcd"),
        ("a7", "a7"),
    ],
)
def test_an_answers_parts_are_found_by_its_id_and_by_the_clients(
    answer: str, request_id: str
) -> None:
    one = request(request_id, penstock_clients_id="mine?")
    for name in (answer, "mine?", request_id):
        assert [found for _, found in named(name, [one])] == [one]


@pytest.mark.parametrize(
    ("request_id", "index"),
    [("cmpl-a-0-0123abcd", 0), ("2_cmpl-a-0-0123abcd", 2), ("1_cmpl-a-2-01234567", 7)],
)
def test_which_choice_it_is_stays_when_others_end(request_id: str, index: int) -> None:
    one = request(request_id, penstock_choices=3)
    assert named("cmpl-a", [one]) == [(index, one)]


def test_others_whose_names_begin_alike_are_not_meant() -> None:
    ids = ["cmpl-job-1-0-0123abcd", "cmpl-job-1-2-0-0123abcd", "chatcmpl-job-1-0123abcd"]
    requests = [request(one) for one in ids]
    assert [one.request_id for _, one in named("cmpl-job-1", requests)] == ids[:1]
    assert [one.request_id for _, one in named("chatcmpl-job-1", requests)] == ids[2:]
    assert named("chatcmpl-job", requests) == []


def test_nothing_is_told_of_others() -> None:
    one = request("cmpl-a-0-0123abcd")
    one.num_prompt_tokens, one.num_output_tokens, one.arrival_time = 3, 0, time.time()
    (told,) = stand("cmpl-a", [one], lambda _: "waiting: behind cmpl-secret (KV memory)")
    assert told["explanation"] == "waiting: behind another (KV memory)"
    (told,) = stand("cmpl-a", [one], lambda _: None)
    assert "grammar" in str(told["explanation"])


@pytest.mark.parametrize("name", ["", "a", "7", "0123abcd", "cmpl", "a7-0-0", ".7", "a7x"])
def test_no_other_name_finds_them(name: str) -> None:
    assert named(name, [request("cmpl-a7-0-0123abcd")]) == []


def test_penstock_explain_and_prometheus_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    registry = CollectorRegistry()
    Gauge("penstock:one", "x", registry=registry).set(3)
    choice = {"index": 0, "prompt_tokens": 4, "output_tokens": 0, "age_s": 1.5}
    standing: dict[str, list[dict[str, Any]]] = {
        "a b?%41": [{**choice, "explanation": "waiting: x"}]
    }
    port = free_port()
    serve(port, registry, lambda name: standing.get(name, []))
    url = f"http://127.0.0.1:{port}"
    assert "penstock:one 3.0" in httpx.get(f"{url}/metrics").text
    assert explain("a b?%41", url=url) == 0
    said = capsys.readouterr().out
    assert said == "choice 0: waiting: x (4 prompt tokens, 0 output tokens, 1.5 s old)\n"
    assert explain("gone", url=url) == 1
    assert "is not open" in capsys.readouterr().err
    assert httpx.get(f"{url}/v1/penstock/requests/{'x' * 1000}").status_code == 404
    gone = httpx.get(f"{url}/v1/penstock/requests/gone")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "request_not_found"
