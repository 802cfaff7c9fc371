"""How much one client, and all together, may ask for at once."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from ptv2_serving.http.problems import ProblemError

# an owner of an IPv6 address has at least this network
IPV6_NETWORK_BITS = 64


class Rates:
    """A token bucket a client, in a bounded memory."""

    def __init__(
        self,
        per_s: float,
        burst: int,
        max_clients: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remember nobody.

        Args:
            per_s: Requests a second, over time; 0: no limit.
            burst: Requests at once after a pause.
            max_clients: Whom to remember; who was silent longest is forgotten first.
            clock: Seconds.
        """
        self._per_s = per_s
        self._burst = float(burst)
        self._max_clients = max_clients
        self._clock = clock
        # client -> (what is left, when it was counted), latest last
        self._buckets: OrderedDict[bytes | str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many clients are remembered."""
        return len(self._buckets)

    def take(self, client: bytes | str) -> None:
        """Count a request of a client.

        Raises:
            ProblemError: It made too many; says when the next one is taken.
        """
        if not self._per_s:
            return
        now = self._clock()
        left, counted = self._buckets.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - counted) * self._per_s)
        is_taken = left >= 1.0
        self._buckets[client] = (left - 1.0 if is_taken else left, now)
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        if not is_taken:
            raise ProblemError(
                "rate",
                f"expected at most {self._per_s:g} requests a second, {self._burst:g} at once",
                retry_after_s=(1.0 - left) / self._per_s,
            )


@lru_cache(maxsize=4096)
def client_of(address: str) -> str:
    """Return who stands behind an address: itself, or the network of one of IPv6."""
    if ":" not in address:
        return address
    try:
        network = ipaddress.ip_network((address.partition("%")[0], IPV6_NETWORK_BITS), strict=False)
    except ValueError:
        return address
    return str(network)
