"""How the server says no: as RFC 9457 has it, and as the protocol under /v2 wants it."""

import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ptv2_core.errors import DataError, PTv2Error
from ptv2_serving.answering import (
    BusyError,
    DeadlineError,
    NotReadyError,
    TooLongError,
    UnknownTaskError,
)

PROTOCOL_PREFIX = "/v2"
PROBLEM_TYPE = "application/problem+json"
# what is not ready now may be soon
NOT_READY_RETRY_S = 1.0

KINDS: Mapping[str, tuple[int, str]] = {
    "bad-request": (400, "The request cannot be read"),
    "unauthorized": (401, "A token is needed"),
    "forbidden": (403, "Not allowed"),
    "not-found": (404, "There is no such address"),
    "unknown-task": (404, "No such task or version is loaded"),
    "method": (405, "The address does not take this method"),
    "slow-body": (408, "The body did not arrive in time"),
    "too-large": (413, "The body is too large"),
    "media-type": (415, "The body is not JSON"),
    "bad-input": (422, "The inputs do not fit the task"),
    "too-long": (422, "An input is too long"),
    "rate": (429, "Too many requests of one client"),
    "busy": (429, "The queue is full"),
    "internal": (500, "The server failed"),
    "not-ready": (503, "The server is starting or draining"),
    "deadline": (504, "The answer was not there in time"),
}
"""Every kind of error: its status and title. The last part of a problem's `type`."""

# any other error is a fault of the server: nothing in the request would mend it
_BY_ERROR: tuple[tuple[type[PTv2Error], str], ...] = (
    (UnknownTaskError, "unknown-task"),
    (TooLongError, "too-long"),
    (BusyError, "busy"),
    (DeadlineError, "deadline"),
    (NotReadyError, "not-ready"),
    (DataError, "bad-input"),
)
_BY_STATUS = {404: "not-found", 405: "method"}


class ProblemError(Exception):
    """A request that is refused.

    Attributes:
        kind: A key of `KINDS`.
        detail: What was expected, what was got, what to do.
        headers: To send with it.
        closes: Whether the connection cannot be used again, since its body was not read.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        closes: bool = False,
    ) -> None:
        """Take the kind, the words and what the client should do."""
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        self.closes = closes

    @property
    def status(self) -> int:
        """The HTTP status."""
        return KINDS[self.kind][0]


class ClientGoneError(Exception):
    """The client closed its connection before the answer was there."""


def problem_of(error: Exception) -> ProblemError:
    """Return how an error is told to a client; an unknown one as `internal`, without its words."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, HTTPException):
        kind = _BY_STATUS.get(error.status_code, "bad-request")
        return ProblemError(kind, _detail_of(kind, str(error.detail)), headers=error.headers)
    for known, kind in _BY_ERROR:
        if isinstance(error, known):
            wait = error.retry_after_s if isinstance(error, BusyError) else None
            if kind == "not-ready":
                wait = NOT_READY_RETRY_S
            return ProblemError(kind, str(error), retry_after_s=wait)
    return ProblemError("internal", "see the server's log under this request id")


def _detail_of(kind: str, given: str) -> str:
    if kind == "not-found":
        return "expected an address of /openapi.json"
    if kind == "method":
        return "expected one of the methods in the header Allow"
    return given


def problem_body(problem: ProblemError, path: str, request_id: str) -> tuple[str, bytes]:
    """Return media type and body of a problem, as the clients of a path expect it."""
    if path == PROTOCOL_PREFIX or path.startswith(PROTOCOL_PREFIX + "/"):
        return "application/json", orjson.dumps({"error": problem.detail})
    status, title = KINDS[problem.kind]
    values: dict[str, Any] = {
        "type": f"urn:ptv2:problem:{problem.kind}",
        "title": title,
        "status": status,
        "detail": problem.detail,
        "request_id": request_id,
    }
    return PROBLEM_TYPE, orjson.dumps(values)


async def refuse(request: Request, error: Exception) -> Response:
    """Turn an error of the framework into ours, which the gate answers."""
    raise problem_of(error) from None
