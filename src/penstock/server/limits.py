"""A bound on the head of a request, which uvicorn's fast parser lacks.

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
    """A protocol class for uvicorn that closes connections whose head does not end in time."""

    class LimitedHttpProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = True

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0
            self._in_head = True

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._in_head:
                return
            self._head_bytes += len(data)
            if self._head_bytes > max_head_bytes and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

    return LimitedHttpProtocol
