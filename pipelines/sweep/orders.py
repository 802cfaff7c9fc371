"""Orders as they go through Prefect: plain JSON, and never with a password.

Prefect keeps a flow run's parameters, and shows them to all who can open its page. What comes out
of it may be of another version, or from another hand: it is checked before anything is done.
"""

import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sqlalchemy

from pipelines.errors import PipelineError
from pipelines.settings import read_environment
from pipelines.sweep.job import Job
from pipelines.sweep.training import Order
from pipelines.sweep.urls import host_and_port, shown, with_driver

SECRETS = ("password", "sslpassword")
PROXY_S = 20.0
"""A proxy that died is started again within seconds."""


def packed(order: Order) -> dict[str, Any]:
    """Return an order as the parameter of a flow run, its database without a password."""
    return asdict(replace(order, url=without_password(order.url)))


def without_password(url: str) -> str:
    """Return a database's URL as others may see it; it still says where the database is."""
    if url.startswith("grpc://"):
        return url  # has none
    parsed = sqlalchemy.engine.make_url(url)
    bare = sqlalchemy.URL.create(
        parsed.drivername,
        username=parsed.username,
        host=parsed.host,
        port=parsed.port,
        database=parsed.database,
        query=parsed.query,
    )
    return bare.difference_update_query(SECRETS).render_as_string()


def unpacked(values: Mapping[str, Any]) -> Order:
    """Return an order that came through Prefect, with this machine's way to the database.

    Raises:
        PipelineError: It cannot be trained here; says what this machine lacks.
    """
    try:
        order = Order(**{**values, "job": Job(**values["job"])})
        root = Path(order.job.root)
        params, checkpoint = Path(order.job.params_file), Path(order.job.checkpoint)
    except (TypeError, LookupError) as error:
        raise PipelineError(
            f"expected an order of this version of ptv2, got another ({error}); install the same "
            "version wherever trials train, and deploy again"
        ) from error
    sweeps = root / ".ptv2" / "sweeps"
    for path in (params, checkpoint):
        if ".." in path.parts or not path.is_relative_to(sweeps):
            raise PipelineError(f"expected a file in {sweeps}, got {path}")
    if not params.is_file():
        raise PipelineError(
            f"{params}: expected the workspace of the sweep, which this worker does not see; have "
            "it at the same path on all machines, on a disk that they share"
        )
    return replace(order, url=_url_from_here(order.url))


def _url_from_here(url: str) -> str:
    if url.startswith("grpc://"):
        _check_proxy(url)
        return url
    own = read_environment().storage
    if own is None:
        return url  # the server may ask for no password, or libpq find one in ~/.pgpass
    own = with_driver(own)
    if without_password(own) != url:
        raise PipelineError(
            f"PTV2_STORAGE: expected the database of the sweep, {url}, with its password, got "
            f"{shown(own)}; set it where the worker is started"
        )
    return own


def _check_proxy(url: str) -> None:
    host, port = host_and_port(url)
    deadline = time.monotonic() + PROXY_S
    while True:
        try:
            with socket.create_connection((host or "", port or 0), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"nothing answers at {url} ({error}): a SQLite study is for workers on the "
                    "machine of the sweep; for several machines set sweep.storage, or "
                    "PTV2_STORAGE, to a PostgreSQL database"
                ) from error
            time.sleep(0.5)
