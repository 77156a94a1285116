"""The bounded queue at the edge, and why a request waits.

The server runs one request at a time, and a client that will hang up keeps that place taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.server.harness import Server, blocked, long_completion, penstock, wait_until

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """One place, two waiting requests, 64 waiting tokens, an order that reads priorities."""
    flags = ("--max-batch", "1", "--max-request-tokens", "8192", "--trace-lengths")
    limits = ("--max-waiting", "2", "--max-waiting-tokens", "64", "--order", "priority")
    with Server(*flags, *limits) as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_full_queue_is_429_with_retry_after(narrow: Server, pool: ThreadPoolExecutor) -> None:
    refused = narrow.metric("request_refused_total")
    with blocked(narrow):
        jobs = [pool.submit(narrow.post, COMPLETIONS, long_completion(4)) for _ in range(2)]
        wait_until(lambda: narrow.stats()["waiting"] == 2)
        answer = narrow.post(COMPLETIONS, long_completion(4))
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert error["code"] == "queue_full"
        assert error["limit"] == "max_waiting"
        assert error["predicted_wait_s"] >= 0
        assert int(answer.headers["retry-after"]) >= error["predicted_wait_s"]
        with narrow.client() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="demo", prompt="x")
    assert [job.result().status_code for job in jobs] == [200, 200]
    assert narrow.metric("request_refused_total") == refused + 2
    assert narrow.stats()["classes"]["default"]["refused"] == refused + 2
    assert narrow.post(COMPLETIONS, long_completion(4)).status_code == 200


def test_queue_is_bounded_in_tokens_too(narrow: Server, pool: ThreadPoolExecutor) -> None:
    body = long_completion(4, prompt=[7] * 60)
    with blocked(narrow):
        job = pool.submit(narrow.post, COMPLETIONS, body)
        wait_until(lambda: narrow.stats()["waiting"] == 1)
        error = narrow.post(COMPLETIONS, body).json()["error"]
    assert error["limit"] == "max_waiting_tokens"
    assert job.result().status_code == 200


def test_choices_are_admitted_together_or_not_at_all(narrow: Server) -> None:
    with blocked(narrow):
        refused = narrow.post(COMPLETIONS, long_completion(4, prompt=["x"] * 3))
        assert refused.status_code == 429
        assert narrow.stats()["open"] == 1
    assert narrow.post(COMPLETIONS, long_completion(4, prompt=["x"] * 3)).status_code == 200


def test_choices_that_can_never_be_taken_together_are_no_matter_of_time(narrow: Server) -> None:
    for fault, body in (
        ("prompt", long_completion(4, prompt=["x"] * 4)),
        ("n", long_completion(4, n=4)),
    ):
        answer = narrow.post(COMPLETIONS, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == fault
        assert "max_waiting is too small" in answer.json()["error"]["message"]
    assert narrow.stats()["open"] == 0


def test_an_unreachable_slo_is_refused_at_once(pool: ThreadPoolExecutor) -> None:
    flags = ("--max-batch", "1", "--trace-lengths", "--max-request-tokens", "8192")
    promise = ("--slo-class", "now=ttft:0.00001,on_miss:expire")
    with Server(*flags, *promise) as server:
        with blocked(server):  # two who waited make a forecast
            jobs = [pool.submit(server.post, COMPLETIONS, long_completion(4)) for _ in range(2)]
            wait_until(lambda: server.stats()["waiting"] == 2)
        assert [job.result().status_code for job in jobs] == [200, 200]
        with blocked(server):
            job = pool.submit(server.post, COMPLETIONS, long_completion(4))
            wait_until(lambda: server.stats()["waiting"] == 1)
            answer = server.post(COMPLETIONS, long_completion(4, slo={"class": "now"}))
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "slo_unreachable"
            assert answer.json()["error"]["limit"] == "slo.ttft"
        assert job.result().status_code == 200


def test_explain_says_why_a_request_waits(narrow: Server, pool: ThreadPoolExecutor) -> None:
    with blocked(narrow):
        body, headers = long_completion(4), {"x-request-id": "asked"}
        job = pool.submit(narrow.post, COMPLETIONS, body, headers)
        wait_until(lambda: narrow.stats()["waiting"] == 1)
        (choice,) = narrow.get("/v1/penstock/requests/asked").json()["choices"]
        assert choice["output_tokens"] == 0
        assert "batch is full" in choice["explanation"]
        told = penstock("explain", "asked", "--url", narrow.url)
        assert told.stdout.startswith("choice 0: waiting: "), told
    assert job.result().status_code == 200
    gone = narrow.get("/v1/penstock/requests/asked")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "request_not_found"
    assert penstock("explain", "asked", "--url", narrow.url).returncode == 1


def test_requests_of_one_name_are_told_apart(narrow: Server, pool: ThreadPoolExecutor) -> None:
    """While one is open it is found by its name, whatever becomes of others of that name."""
    headers = {"x-request-id": "twice"}
    with blocked(narrow):
        jobs = []
        for waiting in (1, 2):
            jobs.append(pool.submit(narrow.post, COMPLETIONS, long_completion(4), headers))
            wait_until(lambda: narrow.stats()["waiting"] == waiting)  # noqa: B023 - used at once
        third = narrow.post(COMPLETIONS, long_completion(4), headers)
        assert third.status_code == 429
        asked = narrow.get("/v1/penstock/requests/twice")
        assert asked.status_code == 200
        assert len(asked.json()["choices"]) == 1
    assert [job.result().status_code for job in jobs] == [200, 200]
    assert narrow.get("/v1/penstock/requests/twice").status_code == 404
    assert narrow.stats()["open"] == 0


def test_priority_is_obeyed_where_the_order_reads_it(
    narrow: Server, pool: ThreadPoolExecutor
) -> None:
    with blocked(narrow):
        jobs = []
        for priority in (5, -5):
            body = long_completion(4, priority=priority)
            headers = {"x-request-id": f"priority{priority}"}
            jobs.append(pool.submit(narrow.post, COMPLETIONS, body, headers))
            wait_until(lambda: narrow.stats()["waiting"] == len(jobs))
    assert [job.result().status_code for job in jobs] == [200, 200]
    ends = [line for line in narrow.log.splitlines() if '"request_end"' in line]
    order = [line for line in ends if '"priority' in line]
    assert ['"priority-5"' in line for line in order] == [True, False]
