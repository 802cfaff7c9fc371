"""Where a study's database is, and a cluster, as params.yaml says it."""

import ipaddress
from urllib.parse import urlsplit

import sqlalchemy


def with_driver(url: str) -> str:
    """Return the URL of a PostgreSQL server with the driver that the extra `postgres` installs.

    Which one `postgresql://` means has changed from one SQLAlchemy to the next.
    """
    scheme, separator, rest = url.partition("://")
    known = scheme in ("postgresql", "postgres")
    return f"postgresql+psycopg2{separator}{rest}" if known else url


def shown(url: str) -> str:
    """Return a database's URL without its password."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return f"{url.partition(':')[0]}:..."
    return parsed.difference_update_query(["password"]).render_as_string(hide_password=True)


def host_and_port(address: str) -> tuple[str | None, int | None]:
    """Return the parts of a cluster's address; none of a name such as `auto`."""
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        port = parts.port
    except ValueError:
        return None, None
    return (parts.hostname, port) if port is not None else (None, None)


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, to itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
