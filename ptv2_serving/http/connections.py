"""Connections: how many, how long their headers may be and take, and how slow their readers."""

import asyncio
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.problems import ProblemError, problem_body

# what a message may take on the wire for each byte of its body: chunks of one byte have six
WIRE_BYTES_PER_BODY_BYTE = 8
MANY_HEADERS = "expected a request line and headers of at most {} bytes together"


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's connection, which bounds neither headers nor the time they take, with limits.

    `bounded` makes the class for a configuration.
    """

    limits: ServeConfig

    def __init__(self, *args: Any, **named: Any) -> None:
        """Start before the first byte."""
        super().__init__(*args, **named)
        self._where: Literal["idle", "head", "body"] = "idle"
        self._head_bytes = 0
        self._wire_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there are not too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, as many as a request may have."""
        self._wire_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        is_answered = self.cycle is None or self.cycle.response_complete
        if self._where == "head":
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_header_bytes:
                self._say(431, MANY_HEADERS.format(self.limits.max_header_bytes))
                return
        elif self._where == "body":
            if is_answered or self._wire_bytes > self._most_wire_bytes():
                self.transport.abort()
            return
        elif not is_answered:
            return
        # headers, or stray bytes between two requests, which end the wait for the next one
        if self._head_timer is None:
            self._arm()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._where = "head"
        self._head_bytes = self._wire_bytes = 0

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the headers were too long."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            raise ValueError(MANY_HEADERS)
        self._disarm()
        self._where = "body"
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the body."""
        self._where = "idle"
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Let go of a connection whose client does not read its last answer."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self.limits.keep_alive_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, whether its client has read everything or not."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or has too long headers."""
        self._disarm()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                # another answer would be taken for the rest of this one
                self.transport.abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        detail = "expected a request of HTTP/1.1, with headers no longer than the server takes"
        self._say(400, detail)

    def _too_slow(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._say(408, f"expected all headers within {self.limits.header_timeout_s:g} s")
        else:
            self.transport.close()

    def _say(self, status: int, detail: str) -> None:
        media_type, body = problem_body(ProblemError("bad-request", detail), "/", "")
        lines = (
            STATUS_LINE[status],
            f"content-type: {media_type}\r\n".encode(),
            f"content-length: {len(body)}\r\n".encode(),
            b"connection: close\r\n\r\n",
            body,
        )
        self.transport.write(b"".join(lines))
        self.transport.close()

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._too_slow)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _most_wire_bytes(self) -> int:
        body = max(self.limits.max_body_bytes, 1 << 20)
        return self.limits.max_header_bytes + WIRE_BYTES_PER_BODY_BYTE * body


def bounded(config: ServeConfig) -> type[BoundedProtocol]:
    """Return the class of the connections of a server."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": config})
