"""Why vLLM ended a request at Penstock's word, in the one field that travels to its client.

vLLM has no finish reason for "refused" or "too late": such a request ends as ``abort``, and
``stop_reason`` says the rest.  :class:`~penstock.vllm.middleware.Middleware` turns it into the
HTTP answer that it deserves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from penstock.core.gate import Refusal
from penstock.core.types import Ended, FinishReason
from penstock.server.errors import ApiError, expired, invalid, too_busy

_MARK = "penstock: "
Kind: TypeAlias = Literal["invalid", "refused", "rejected", "expired", "failed"]


class _Extra(msgspec.Struct, omit_defaults=True):
    """What programs want to know besides."""

    param: str = ""
    limit: str = ""
    wait: float = 0.0
    retry_after: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """An end that was not the request's own.

    Attributes:
        kind: ``invalid``: it can never be served; ``refused``: not now; ``rejected``: by the
            admission policy; ``expired``: a promise was missed that it wanted kept or nothing;
            ``failed``: else.
        reason: in words.
        param: the field at fault, for ``invalid``.
        limit, wait, retry_after: of a refusal, see :class:`~penstock.core.gate.Refusal`.
    """

    kind: Kind
    reason: str
    param: str = ""
    limit: str = ""
    wait: float = 0.0
    retry_after: int = 0

    @classmethod
    def of_refusal(cls, refusal: Refusal) -> Verdict:
        """The gate's word."""
        wait = round(refusal.predicted_wait, 3)
        return cls("refused", refusal.reason, "", refusal.limit, wait, refusal.retry_after)

    @classmethod
    def of_end(cls, ended: Ended) -> Verdict:
        """The scheduler's word."""
        if ended.reason is FinishReason.EXPIRED:
            return cls("expired", ended.detail)
        kind: Kind = "rejected" if ended.reason is FinishReason.REJECTED else "failed"
        return cls(kind, ended.detail or str(ended.reason))

    def encode(self) -> str:
        """As a ``stop_reason``: words first, then what programs want to know."""
        extra = _Extra(self.param, self.limit, self.wait, self.retry_after)
        # The last " {" is where this begins, whatever its strings say.
        tail = msgspec.json.encode(extra).decode().replace(" {", r" \u007b")
        return f"{_MARK}{self.kind}: {self.reason} {tail}"

    @classmethod
    def decode(cls, stop_reason: object) -> Verdict | None:
        """What :meth:`encode` wrote; None for every other ``stop_reason``."""
        if not isinstance(stop_reason, str) or not stop_reason.startswith(_MARK):
            return None
        kind, _, rest = stop_reason.removeprefix(_MARK).partition(": ")
        reason, _, tail = rest.rpartition(" {")
        try:
            extra = msgspec.json.decode("{" + tail, type=_Extra)
            known = msgspec.convert(kind, Kind)
        except msgspec.MsgspecError:
            return None
        return cls(known, reason, extra.param, extra.limit, extra.wait, extra.retry_after)

    def error(self) -> ApiError:
        """The answer that an HTTP client should get."""
        if self.kind == "invalid":
            return invalid(self.param or None, self.reason)
        if self.kind == "expired":
            return expired(self.reason)
        if self.kind == "failed":
            return ApiError(500, self.reason, code="engine_error", kind="server_error")
        code = "request_rejected"
        if self.kind == "refused":
            code = "queue_full" if self.limit.startswith("max_") else "slo_unreachable"
        after = max(1, self.retry_after)
        return too_busy(self.reason, code, self.wait, retry_after=after, limit=self.limit or None)
