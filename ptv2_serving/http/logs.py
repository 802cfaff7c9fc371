"""One line of JSON for each request and each event, without texts."""

import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import TextIO

import orjson

from ptv2_serving.http.exchanges import Exchange

# of texts in a line, where they are logged at all
MAX_TEXTS_BYTES = 65_536


class RequestLog:
    """Writes a line for each request."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to a stream; None: standard error."""
        self._stream = stream

    def request(
        self, exchange: Exchange, *, method: str, route: str, status: int, seconds: float
    ) -> None:
        """Write the line of a request that is over.

        Args:
            exchange: What is known of it.
            method: GET, POST, ...
            route: The address with names in place of its parts, so that no line holds a client's.
            status: Of the answer; 499: the client went before.
            seconds: How long it took.
        """
        line = {
            "time": _now(),
            "event": "request",
            "request_id": exchange.request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 3),
        }
        if exchange.asks:
            line |= {"task": exchange.task, "version": exchange.version, "role": exchange.role}
            line["n"] = exchange.inputs
        if exchange.problem is not None:
            line["problem"] = exchange.problem
        if exchange.texts is not None:
            line["inputs"] = _bounded(exchange.texts)
        self._write(line)

    def failure(self, exchange: Exchange, error: BaseException, *, with_message: bool) -> None:
        """Write what went wrong in the server, and where.

        Args:
            exchange: The request.
            error: What was raised.
            with_message: Whether its words are logged; they may hold a client's text.
        """
        line: dict[str, object] = {
            "time": _now(),
            "event": "failure",
            "request_id": exchange.request_id,
            "error": type(error).__name__,
            "frames": _frames(error),
        }
        if with_message:
            line["message"] = str(error)
        self._write(line)

    def _write(self, line: dict[str, object]) -> None:
        stream = self._stream or sys.stderr
        stream.write(orjson.dumps(line, default=str).decode() + "\n")
        stream.flush()


class JsonFormatter(logging.Formatter):
    """Other modules' log records as such lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "event": "log",
            "logger": record.name,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = record.exc_info[1].__class__.__name__
            line["frames"] = _frames(record.exc_info[1])
        return orjson.dumps(line, default=str).decode()


def _now() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"


def _frames(error: BaseException) -> list[str]:
    return [
        f"{frame.filename}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]


def _bounded(texts: object) -> object:
    size = len(orjson.dumps(texts, default=str))
    return texts if size <= MAX_TEXTS_BYTES else f"left out: {size} bytes"
