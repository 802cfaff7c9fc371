"""Where a server listens, whom it lets in, and what it takes; checked together."""

import ipaddress
import math
from dataclasses import dataclass, fields

from ptv2_core.errors import ConfigError

LOOPBACK_NAMES = ("localhost", "localhost.localdomain")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How prompts are served over HTTP.

    Attributes:
        host: The address to listen on; any but loopback needs tokens.
        port: 0 takes any that is free.
        tokens: sha256 of each token that may ask for predictions; empty: everybody who gets here.
        admin_tokens: Likewise for `/v1/admin/`; empty: clients on this machine.
        max_body_bytes: Of a request.
        max_inputs: Of a request.
        max_text_chars: Of each text of an input.
        max_words: Of each list of an input.
        max_json_depth: How deep objects and lists may lie in each other.
        refuse_long: Whether a text of more tokens than its task takes is an error; else it is cut.
        rate_per_s: Requests of one client in a second, over time; 0: no limit.
        rate_burst: Requests that a client may make at once after a pause.
        max_clients: Clients whose rates are remembered; the one that was silent longest goes first.
        max_concurrent: Requests for predictions that are read and answered side by side.
        max_connections: Open ones; more are closed at once.
        max_header_bytes: Of the request line and headers together.
        header_timeout_s: For the whole of them to arrive.
        body_timeout_s: For the whole body to arrive.
        keep_alive_s: How long an idle connection stays open.
        timeout_s: For an answer where the request does not say.
        max_timeout_s: The most that a request may ask for.
        drain_timeout_s: For accepted requests to be answered once the server is told to stop.
        log_texts: Whether inputs go to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: frozenset[bytes] = frozenset()
    admin_tokens: frozenset[bytes] = frozenset()
    max_body_bytes: int = 1 << 20
    max_inputs: int = 64
    max_text_chars: int = 100_000
    max_words: int = 10_000
    max_json_depth: int = 16
    refuse_long: bool = False
    rate_per_s: float = 0.0
    rate_burst: int = 50
    max_clients: int = 10_000
    max_concurrent: int = 1024
    max_connections: int = 2048
    max_header_bytes: int = 16_384
    header_timeout_s: float = 10.0
    body_timeout_s: float = 20.0
    keep_alive_s: float = 30.0
    timeout_s: float = 10.0
    max_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0
    log_texts: bool = False

    def __post_init__(self) -> None:
        """Check everything.

        Raises:
            ConfigError: With all problems.
        """
        problems = [*self._sizes(), *self._times()]
        if not 0 <= self.port <= 65535:
            problems.append(("port", f"expected 0 to 65535, got {self.port}"))
        if not self.max_json_depth <= 256:
            problems.append(("max_json_depth", f"expected at most 256, got {self.max_json_depth}"))
        if self.timeout_s > self.max_timeout_s:
            problems.append(
                ("timeout_s", f"expected at most max_timeout_s ({self.max_timeout_s:g}), got "
                 f"{self.timeout_s:g}")
            )  # fmt: skip
        if not self.is_loopback and not self.tokens:
            problems.append(
                ("host", f"{self.host or 'every address'} can be reached from other machines, and "
                 "no token is asked for; give --token-file, or listen on 127.0.0.1")
            )  # fmt: skip
        if problems:
            raise ConfigError(problems)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def _sizes(self) -> list[tuple[str, str]]:
        names = [field.name for field in fields(self) if field.type is int and field.name != "port"]
        return [
            (name, f"expected at least 1, got {getattr(self, name)}")
            for name in names
            if getattr(self, name) < 1
        ]

    def _times(self) -> list[tuple[str, str]]:
        problems = [
            (field.name, f"expected a number of seconds above 0, got {getattr(self, field.name)}")
            for field in fields(self)
            if field.name.endswith("_s") and field.name != "rate_per_s"
            if not (math.isfinite(getattr(self, field.name)) and getattr(self, field.name) > 0)
        ]
        if not (math.isfinite(self.rate_per_s) and self.rate_per_s >= 0):
            problems.append(("rate_per_s", f"expected 0 or more, got {self.rate_per_s}"))
        return problems


def is_loopback(host: str) -> bool:
    """Tell whether an address is one of this machine alone; names but `localhost` are not."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
