"""When a canary is taken back by itself. Pure values; who acts on them is the service."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

# answers that are remembered for each side
WINDOW = 500


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a canary may do worse than the champion.

    Attributes:
        min_requests: Of the canary, before it is judged.
        error_share: By how much its share of failed requests may be higher, 0 to 1.
        latency_factor: By how much its median latency may be longer.
        latency_s: And by how many seconds at least, so that microseconds are no reason.
    """

    min_requests: int = 50
    error_share: float = 0.05
    latency_factor: float = 2.0
    latency_s: float = 0.02


@dataclass(kw_only=True)
class Record:
    """The latest requests of one side."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, seconds: float, *, failed: bool) -> None:
        """Remember a request."""
        self.failed.append(failed)
        if not failed:
            self.seconds.append(seconds)

    @property
    def error_share(self) -> float:
        """Share of failed requests, 0 to 1."""
        return sum(self.failed) / max(len(self.failed), 1)


def verdict(champion: Record, canary: Record, limits: Limits) -> str | None:
    """Say why a canary must go, or None while it may stay.

    The champion's record is that of the same time: what slows both is no reason.
    """
    if len(canary.failed) < limits.min_requests:
        return None
    if canary.error_share > champion.error_share + limits.error_share:
        return (
            f"{canary.error_share:.0%} of its last {len(canary.failed)} requests failed, "
            f"{champion.error_share:.0%} of the champion's"
        )
    own, other = _median(canary.seconds), _median(champion.seconds)
    if other and own > max(other * limits.latency_factor, other + limits.latency_s):
        return f"its median latency is {own * 1e3:.0f} ms, the champion's {other * 1e3:.0f} ms"
    return None


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return median(found) if found else 0.0
