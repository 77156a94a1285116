from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.core.gate import Refusal
from penstock.core.types import Ended, FinishReason
from penstock.vllm.verdict import Verdict

kinds = st.sampled_from(["invalid", "refused", "rejected", "expired", "failed"])
words = st.text(max_size=60)


@given(kinds, words, words, words, st.floats(0, 1e6), st.integers(0, 10**6))
@example("invalid", "a {", "slo. {", " { {", 0.0, 0)
def test_what_was_encoded_is_decoded(
    kind: str, reason: str, param: str, limit: str, wait: float, after: int
) -> None:
    verdict = Verdict(kind, reason, param, limit, wait, after)  # type: ignore[arg-type]
    assert Verdict.decode(verdict.encode()) == verdict


@pytest.mark.parametrize(
    "other",
    [None, 7, "", "stop", "penstock", "penstock: ", "penstock: no: x {}", "penstock: expired: x"],
)
def test_other_stop_reasons_are_not_verdicts(other: object) -> None:
    assert Verdict.decode(other) is None


def test_words_come_first_for_people() -> None:
    text = Verdict.of_refusal(Refusal("8 requests wait; the limit is 8", 2.5, 3, "max_waiting"))
    assert text.encode().startswith("penstock: refused: 8 requests wait; the limit is 8 {")


@pytest.mark.parametrize(
    ("verdict", "status", "code"),
    [
        (Verdict("invalid", "no", "slo.class"), 400, "invalid_value"),
        (Verdict("refused", "full", limit="max_waiting", retry_after=7), 429, "queue_full"),
        (Verdict("refused", "late", limit="slo.ttft", retry_after=7), 429, "slo_unreachable"),
        (Verdict("rejected", "policy"), 429, "request_rejected"),
        (Verdict("expired", "late"), 504, "deadline_exceeded"),
        (Verdict("failed", "lost"), 500, "engine_error"),
    ],
)
def test_each_has_its_answer(verdict: Verdict, status: int, code: str) -> None:
    error = verdict.error()
    assert error.status == status
    body = msgspec.json.decode(error.body())["error"]
    assert body["code"] == code
    if verdict.kind in {"refused", "rejected"}:
        assert error.headers["retry-after"] == str(max(1, verdict.retry_after))


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (FinishReason.EXPIRED, "expired"),
        (FinishReason.REJECTED, "rejected"),
        (FinishReason.FAILED, "failed"),
    ],
)
def test_ends_of_the_scheduler_keep_their_words(reason: FinishReason, kind: str) -> None:
    verdict = Verdict.of_end(Ended("r", reason, 3, 0, "the words"))
    assert (verdict.kind, verdict.reason) == (kind, "the words")
