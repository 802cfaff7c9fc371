"""A request's body: bounded while it arrives, then read as JSON."""

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive

from ptv2_serving.http.problems import ClientGoneError, ProblemError

JSON_TYPES = (b"application/json", b"text/json")
# of what a refused client still sends, read so that it comes to see the answer
MAX_DISCARDED_BYTES = 8 << 20
DISCARD_TIMEOUT_S = 1.0


async def read_json(
    headers: Mapping[bytes, bytes],
    receive: Receive,
    *,
    max_bytes: int,
    timeout_s: float,
    max_depth: int,
) -> Any:
    """Return what a body holds.

    Args:
        headers: By lower-case name.
        receive: Gives the body, part by part.
        max_bytes: Of it.
        timeout_s: For it to arrive.
        max_depth: Of objects and lists in each other.

    Raises:
        ProblemError: It is no JSON, too large, too slow or too deep.
        ClientGoneError: The client went before it was there.
    """
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type not in JSON_TYPES:
        raise ProblemError(
            "media-type",
            f"expected Content-Type application/json, got {media_type.decode('latin-1')[:80]!r}",
            closes=True,
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ProblemError("media-type", "expected a body without Content-Encoding", closes=True)
    body = await _read(headers, receive, max_bytes, timeout_s)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # its message shows no part of the body
        raise ProblemError(
            "bad-request", f"expected JSON in UTF-8, without NaN and Infinity: {error}"
        ) from None
    check_depth(value, max_depth)
    return value


def check_depth(value: Any, room: int) -> None:
    """Refuse objects and lists that lie too deep in each other."""
    if not isinstance(value, dict | list):
        return
    if room == 0:
        raise ProblemError("bad-request", "expected JSON that is nested less deeply")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            check_depth(item, room - 1)


async def _read(
    headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int, timeout_s: float
) -> bytes:
    announced = headers.get(b"content-length", b"")
    # a long one is not even asked for: a client that expects `100 Continue` sends nothing
    if announced.isdigit() and int(announced[:20]) > max_bytes:
        if b"expect" not in headers:
            await discard(receive)
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    break
                parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError:
        raise ProblemError(
            "slow-body", f"expected the whole body within {timeout_s:g} s", closes=True
        ) from None
    await discard(receive)
    raise _too_large(max_bytes)


async def discard(receive: Receive) -> bool:
    """Read on for a moment and keep nothing; return whether the body came to its end.

    A client that is still sending would see a broken connection in place of the answer.
    """
    size = 0
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while size < MAX_DISCARDED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect":
                    return False
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        pass
    return False


def _too_large(max_bytes: int) -> ProblemError:
    return ProblemError(
        "too-large",
        f"expected a body of at most {max_bytes:,} bytes; send the inputs in several requests",
        closes=True,
    )
