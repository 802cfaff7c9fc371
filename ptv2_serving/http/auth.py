"""Who may ask: bearer tokens, kept as their sha256, and what a browser may do on loopback."""

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ptv2_core.errors import ConfigError
from ptv2_serving.http.config import LOOPBACK_NAMES, ServeConfig, is_loopback
from ptv2_serving.http.problems import ProblemError

MAX_FILE_BYTES = 1 << 20
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")
ADMIN_PREFIX = "/v1/admin/"
OPEN_PATHS = frozenset(
    {
        "/", "/page.css", "/page.js", "/icon.svg", "/healthz", "/readyz", "/metrics",
        "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready",
    }
)  # fmt: skip
"""What needs no token: every other address does, were it added tomorrow."""

# what a proxy adds: a request through it comes from elsewhere, wherever the proxy is
FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


def read_tokens(path: Path) -> frozenset[bytes]:
    """Return the sha256 of each token of a file.

    Args:
        path: One token a line; empty lines do not count.

    Raises:
        ConfigError: The file cannot be read, holds none, or holds something else; the message
            shows no token.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected a file of tokens: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: expected a file of tokens of at most {MAX_FILE_BYTES:,} bytes")
    tokens = set()
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
        token = line.strip()
        if not token:
            continue
        if TOKEN.fullmatch(token) is None:
            raise ConfigError(
                f"{path}:{number}: expected a token of 16 to 512 letters, digits and . _ ~ + / -; "
                "`openssl rand -hex 32` makes a good one"
            )
        tokens.add(digest_of(token.encode("ascii")))
    if not tokens:
        raise ConfigError(f"{path}: expected a token a line, the file has none")
    return frozenset(tokens)


def digest_of(token: bytes) -> bytes:
    """Return what is kept of a token."""
    return hashlib.sha256(token).digest()


def check_allowed(
    path: str,
    method: str,
    headers: Mapping[bytes, bytes],
    client: str | None,
    config: ServeConfig,
) -> bytes | None:
    """Refuse whom the server does not know.

    Args:
        path: What is asked for.
        method: How.
        headers: By lower-case name.
        client: The address of the connection.
        config: Holds the tokens.

    Returns:
        The digest of the token that was given and is known, or None where none is asked for.

    Raises:
        ProblemError: 401 without a token, 403 where it would not help.
    """
    _check_origin(method, headers)
    if path.startswith(ADMIN_PREFIX):
        if config.admin_tokens:
            return _check_token(headers, config.admin_tokens)
        _check_local(headers, client, config)
        return None
    if config.tokens:
        return None if path in OPEN_PATHS else _check_token(headers, config.tokens)
    _check_host(headers, config)
    return None


def _check_token(headers: Mapping[bytes, bytes], known: frozenset[bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    given = digest_of(token.strip())
    found = False
    for digest in known:  # all of them, so that the time says nothing
        found |= hmac.compare_digest(digest, given)
    if scheme.lower() != b"bearer" or not found:
        what = "an unknown one" if token else "none"
        raise ProblemError(
            "unauthorized",
            f"expected the header `Authorization: Bearer TOKEN` with a token, got {what}",
            headers={"WWW-Authenticate": 'Bearer realm="ptv2"'},
        )
    return given


def _check_local(headers: Mapping[bytes, bytes], client: str | None, config: ServeConfig) -> None:
    is_near = config.is_loopback and client is not None and is_loopback(client)
    if not is_near or any(name in headers for name in FORWARDED):
        raise ProblemError(
            "forbidden",
            "without --admin-token-file, this address answers on loopback only, and not through "
            "a proxy",
        )
    _check_host(headers, config)


def _check_host(headers: Mapping[bytes, bytes], config: ServeConfig) -> None:
    """Refuse a page of elsewhere whose name was made to point here (DNS rebinding)."""
    host = _host_name(headers.get(b"host", b""))
    if host not in (*LOOPBACK_NAMES, config.host.lower()) and not is_loopback(host):
        raise ProblemError(
            "forbidden",
            "expected a Host header with localhost or a loopback address, which is all that a "
            "server without tokens answers to",
        )


def _check_origin(method: str, headers: Mapping[bytes, bytes]) -> None:
    """Refuse what a page of elsewhere makes a browser send."""
    origin = headers.get(b"origin")
    if method == "GET" or origin is None:
        return
    if urlsplit(origin.decode("latin-1")).netloc.lower() != _text(headers.get(b"host", b"")):
        raise ProblemError("forbidden", "expected a request of this server's own page or no page")


def _host_name(header: bytes) -> str:
    host = _text(header)
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _text(header: bytes) -> str:
    return header.decode("latin-1").lower()
