"""Audit lines: every change of what answers, as tags of the registered model.

A line is written before the change that it tells of, so there is no change without a line. A line
whose change did not happen, since the process died in between, is one that the next line's `before`
contradicts.
"""

import getpass
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ptv2_core.bounded import is_whole, parse_json
from ptv2_core.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "ptv2.audit."
CHAMPION_ACTIONS = ("register", "promote", "rollback")
MAX_REASON = 500
MAX_LINE_BYTES = 5000


@dataclass(frozen=True, kw_only=True)
class AuditLine:
    """One change.

    Attributes:
        when: In UTC, ISO 8601.
        who: User and host.
        action: `register`, `promote`, `rollback`, `canary`, `stop-canary`, `shadow`, `stop-shadow`
            or `sign`.
        before: The version that was there, or None.
        after: The version that is there now, or None.
        reason: Why, in words.
    """

    when: str
    who: str
    action: str
    before: int | None
    after: int | None
    reason: str


def write(
    client: "MlflowClient",
    task: str,
    action: str,
    *,
    before: int | None,
    after: int | None,
    who: str,
    reason: str = "",
) -> str:
    """Write a line, and return the key of its tag.

    Args:
        client: Of the registry.
        task: Whose line.
        action: As in `AuditLine`, like all that follows.
        before: Likewise.
        after: Likewise.
        who: Likewise.
        reason: Likewise; cut to 500 characters.
    """
    now = datetime.now(UTC)
    line = {
        "when": now.isoformat(timespec="microseconds"),
        "who": _printable(who),
        "action": action,
        "from": before,
        "to": after,
        "reason": _printable(reason),
    }
    key = f"{PREFIX}{now:%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"
    client.set_registered_model_tag(task, key, json.dumps(line))
    return key


def read(tags: Mapping[str, str]) -> list[AuditLine]:
    """Return the lines among a registered model's tags, oldest first; what is none is left out."""
    lines = [_parse(tags[key]) for key in sorted(tags) if key.startswith(PREFIX)]
    return [line for line in lines if line is not None]


def champions(lines: list[AuditLine], current: int | None) -> list[int]:
    """Return the versions that were champion one after the other; the last is the present one.

    A rollback takes away what it undid, so that the next one goes further back instead of forth
    again.

    Args:
        lines: Oldest first.
        current: The champion now; it may have been set without a line.
    """
    stack: list[int] = []

    def put(version: int | None) -> None:
        if version is not None and (not stack or stack[-1] != version):
            stack.append(version)

    for line in lines:
        if line.action not in CHAMPION_ACTIONS:
            continue
        put(line.before)
        if line.action == "rollback" and line.after in stack:
            while stack[-1] != line.after:
                stack.pop()
        put(line.after)
    put(current)
    return stack


def was_rolled_back(lines: list[AuditLine], version: int) -> bool:
    """Tell whether a version was taken from the champion's place, and not put there again."""
    last = [
        line
        for line in lines
        if line.action in CHAMPION_ACTIONS
        and (line.after == version or (line.action == "rollback" and line.before == version))
    ]
    return bool(last) and last[-1].action == "rollback" and last[-1].before == version


def current_user() -> str:
    """Return user and host of this process, for audit lines."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _parse(text: str) -> AuditLine | None:
    try:
        values: Any = parse_json(text.encode(), "audit line", most_bytes=MAX_LINE_BYTES)
    except (ArtifactError, UnicodeEncodeError):
        return None
    if not isinstance(values, dict):
        return None
    texts = [values.get(key) for key in ("when", "who", "action", "reason")]
    numbers = [values.get(key) for key in ("from", "to")]
    if not all(isinstance(text, str) for text in texts) or not all(
        number is None or is_whole(number, 1) for number in numbers
    ):
        return None
    return AuditLine(
        when=_printable(values["when"]),
        who=_printable(values["who"]),
        action=_printable(values["action"]),
        before=values["from"],
        after=values["to"],
        reason=_printable(values["reason"]),
    )


def _printable(text: str) -> str:
    """Return text for one line of a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_REASON])
