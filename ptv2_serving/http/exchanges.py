"""One request and its answer, and all of them together."""

import re
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
WINDOW_S = 60.0
MAX_RECENT = 4096


@dataclass(slots=True)
class Exchange:
    """What is known of a request while it is answered; handlers fill it in.

    Attributes:
        request_id: The client's own where it fits `REQUEST_ID`, else a new one.
        headers: By lower-case name; the last of each.
        started_s: On the monotonic clock.
        is_read: Whether its body was read to the end.
        asks: Whether it asks for a prediction.
        task: Which it asks, where it is loaded.
        role: In which part the prompt was asked.
        version: Which answered.
        inputs: How many.
        truncated: How many of them were cut.
        texts: The inputs, where they are logged.
        problem: Why it was refused.
    """

    request_id: str
    headers: Mapping[bytes, bytes]
    started_s: float = field(default_factory=time.perf_counter)
    is_read: bool = False
    asks: bool = False
    task: str | None = None
    role: str = ""
    version: int | None = None
    inputs: int = 0
    truncated: int = 0
    texts: object = None
    problem: str | None = None


def request_id_of(header: bytes) -> str:
    """Return a client's own request id, or a new one where it has none that can be used."""
    given = header.decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


class Traffic:
    """What goes through the server now, and went through it lately.

    Attributes:
        draining: Whether new requests are refused.
        running: Requests for predictions that are being read and answered.
        pending: All requests that are being answered.
        started_s: When the server was made.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.draining = False
        self.running = 0
        self.pending = 0
        self.started_s = time.monotonic()
        self._recent: deque[tuple[float, float]] = deque(maxlen=MAX_RECENT)

    def note(self, seconds: float) -> None:
        """Remember how long a prediction took."""
        self._recent.append((time.monotonic(), seconds))

    def recent(self) -> tuple[int, float | None, float | None]:
        """Return count, median and 95th percentile of the last minute, in seconds."""
        since = time.monotonic() - WINDOW_S
        found = sorted(seconds for when, seconds in self._recent if when >= since)
        if not found:
            return 0, None, None
        return len(found), _at(found, 0.5), _at(found, 0.95)


def _at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]
