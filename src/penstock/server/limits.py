"""A bound on the head of a request, and on its trailers, which uvicorn's fast parser lacks.

Without it a client could send header lines for ever, and the parser would keep
them all.  Heads that arrive whole are checked by :class:`penstock.server.app.Edge`;
this class only cuts off those that do not end.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


def limited_protocol(max_head_bytes: int) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn that closes connections whose head does not end in time.

    It counts the bytes since a request last got anywhere: since it began, its head ended, a part
    of its body came or it ended.  The parser tells of a field only once it is whole, so counting
    fields would miss one that never ends.  The read in which that happened is not counted, since
    how much of it came later is not known.
    """

    class LimitedHttpProtocol(HttpToolsProtocol):
        _in_head = False
        _got_on = False
        _bytes_since = 0

        def on_message_begin(self) -> None:
            self._in_head = self._got_on = True
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            # The fields behind a chunked body come here too, and uvicorn would add them to the
            # head's, which nobody may have looked at yet.
            if self._in_head:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head, self._got_on = False, True
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._got_on = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._got_on = True
            super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            self._got_on = False
            super().data_received(data)
            self._bytes_since = 0 if self._got_on else self._bytes_since + len(data)
            if self._bytes_since > max_head_bytes and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

    return LimitedHttpProtocol
