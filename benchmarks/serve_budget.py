"""The time that a run may take, whatever the machine's speed: what is behind does less."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

# of what was planned: less would measure nothing
LEAST = 0.1


@dataclass(frozen=True)
class Usual:
    """What a part takes on a machine of the usual speed, in seconds.

    Attributes:
        fixed_s: However much of it is done.
        scaled_s: When all of it is done.
    """

    fixed_s: float
    scaled_s: float


class Budget:
    """Parts of a run, one after the other, each as large as the time that is left allows.

    How fast the machine is shows in the parts that are done. All that is left is shortened alike.

    Attributes:
        seconds: What each part took.
        shortened: Of each part that was shortened, the share that was done.
    """

    def __init__(
        self,
        seconds: float | None,
        parts: Mapping[str, Usual],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            seconds: For all parts; None: as long as they take.
            parts: What each usually takes.
            clock: Seconds.
        """
        self.seconds: dict[str, float] = {}
        self.shortened: dict[str, float] = {}
        self._left = dict(parts)
        self._clock = clock
        self._until_s = math.inf if seconds is None else clock() + seconds
        # what the parts so far took, and what as much takes at the usual speed
        self._took_s = self._usual_s = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[float]:
        """Yield which share of a part to do, at most 1."""
        usual, began_s = self._left[name], self._clock()
        share = self._share(self._until_s - began_s)
        if share < 1 and usual.scaled_s:
            self.shortened[name] = share
        yield share
        del self._left[name]
        self.seconds[name] = self._clock() - began_s
        self._took_s += self.seconds[name]
        self._usual_s += usual.fixed_s + share * usual.scaled_s

    def _share(self, room_s: float) -> float:
        """Return which share of all that is left fits into so many seconds."""
        slowness = self._took_s / self._usual_s if self._usual_s else 1.0
        fixed_s = slowness * sum(usual.fixed_s for usual in self._left.values())
        scaled_s = slowness * sum(usual.scaled_s for usual in self._left.values())
        if fixed_s + scaled_s <= room_s:
            return 1.0
        return min(1.0, max(LEAST, (room_s - fixed_s) / max(scaled_s, 1e-9)))


def scaled(count: int, share: float, *, least: int) -> int:
    """Return a share of a count, no less than `least` nor more than the count."""
    return min(count, max(least, round(count * share)))
