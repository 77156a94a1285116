"""SLO headers, body fields and classes: parsing, and what they do to a request."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config import BOUNDS
from penstock.core.types import SLO, OnMiss
from penstock.server.errors import ApiError
from penstock.server.slo import MAX_MS, MIN_MS, resolve
from penstock.settings import SLOClass
from tests.server.harness import Server, long_completion, wait_until

CLASSES = {
    "interactive": SLOClass(ttft=0.5, tpot=0.03, on_miss=OnMiss.EXPIRE),
    "batch": SLOClass(e2e=600.0, on_miss=OnMiss.DEMOTE),
}
GOOD = st.floats(min_value=MIN_MS, max_value=MAX_MS)
BOUND = st.sampled_from(BOUNDS)


BOUNDS_MS = st.dictionaries(BOUND, GOOD)
TOO_SMALL = st.floats(max_value=MIN_MS, exclude_max=True).map(repr)
WRONG = st.text() | TOO_SMALL | st.sampled_from(["nan", "inf", "1e300", "1e-323"])


@given(BOUNDS_MS, BOUNDS_MS, st.sampled_from([*CLASSES, None]))
def test_header_and_body_bounds_replace_the_class(
    headers: dict[str, float], body: dict[str, float], name: str | None
) -> None:
    raw = {f"x-slo-{bound}-ms": repr(value) for bound, value in headers.items()}
    fields: dict[str, object] = {f"{bound}_ms": value for bound, value in body.items()}
    if name is not None:
        fields["class"] = name
    if any(headers[bound] != body[bound] for bound in headers.keys() & body.keys()):
        with pytest.raises(ApiError) as refusal:
            resolve(raw, fields, CLASSES)
        assert "must not differ" in refusal.value.message
        return
    promise = resolve(raw, fields, CLASSES)
    base = CLASSES.get(name or "", SLOClass())
    assert promise.slo_class == (name or "default")
    assert promise.on_miss is base.on_miss
    for bound in BOUNDS:
        given_ms = headers.get(bound, body.get(bound))
        kept = getattr(base, bound)
        assert getattr(promise.slo, bound) == (kept if given_ms is None else given_ms / 1000)


@given(BOUND, WRONG)
def test_a_bad_header_is_named(bound: str, value: str) -> None:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    header = f"x-slo-{bound}-ms"
    if MIN_MS <= number <= MAX_MS:
        assert resolve({header: value}, None, {}).slo != SLO()
        return
    with pytest.raises(ApiError) as refusal:
        resolve({header: value}, None, {})
    assert refusal.value.status == 400
    assert refusal.value.param == header
    assert repr(value) in refusal.value.message


def test_class_from_header_or_body() -> None:
    assert resolve({"x-slo-class": "batch"}, None, CLASSES).on_miss is OnMiss.DEMOTE
    assert resolve({"x-slo-class": "batch"}, {"class": "batch"}, CLASSES).slo == SLO(e2e=600.0)
    with pytest.raises(ApiError, match="must not differ"):
        resolve({"x-slo-class": "batch"}, {"class": "interactive"}, CLASSES)
    with pytest.raises(ApiError, match="batch, default, interactive"):
        resolve({"x-slo-class": "gold"}, None, CLASSES)


def test_the_default_class_can_be_configured() -> None:
    classes = {"default": SLOClass(ttft=2.0, on_miss=OnMiss.EXPIRE)}
    assert resolve({}, None, classes).slo == SLO(ttft=2.0)


@pytest.fixture(scope="module")
def classy() -> Iterator[Server]:
    easy, hard = "easy=ttft:30,e2e:60", "hard=tpot:0.000001"
    now = "now=e2e:0.15,on_miss:expire"
    classes = [word for text in (easy, hard, now) for word in ("--slo-class", text)]
    with Server("--trace-lengths", *classes) as server:
        yield server


def test_attainment_and_goodput_by_class(classy: Server) -> None:
    for name, in_body in (("easy", True), ("easy", False), ("hard", True)):
        extra = {"slo": {"class": name}} if in_body else {}
        headers = {} if in_body else {"x-slo-class": name}
        assert classy.post("/v1/completions", long_completion(8, **extra), headers).is_success
    classes = classy.stats()["classes"]
    assert classes["easy"] == {"met": 2, "missed": 0, "refused": 0, "goodput_tokens": 16}
    assert classes["hard"] == {"met": 0, "missed": 1, "refused": 0, "goodput_tokens": 0}
    assert classy.metric("goodput_tokens_total") == 16
    assert '"slo_met": false' in classy.log


def test_expired_request_is_an_error_and_never_a_length(classy: Server) -> None:
    whole = classy.post("/v1/completions", long_completion(6000, slo={"class": "now"}))
    assert whole.status_code == 504
    assert whole.json()["error"]["code"] == "deadline_exceeded"
    assert whole.headers["x-should-retry"] == "false"
    reasons = []
    body = {"trace_output_tokens": 6000, "slo": {"class": "now"}}
    with classy.client() as client, pytest.raises(openai.APIError, match="deadline"):  # noqa: PT012
        stream = client.completions.create(
            model="demo", prompt="x", max_tokens=6000, stream=True, extra_body=body
        )
        reasons.extend(chunk.choices[0].finish_reason for chunk in stream)
    assert set(reasons) <= {None}
    wait_until(lambda: classy.stats()["kv_usage"] == 0)
    assert classy.stats()["classes"]["now"]["missed"] == 2
