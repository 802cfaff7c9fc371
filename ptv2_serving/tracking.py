"""Where the registry is: its URI made absolute, and a quick look whether it answers.

MLflow retries for minutes before it admits that a server is away, and creates a database that is
not there. So both are looked at here first, without MLflow and without writing anything.
"""

import importlib.util
import logging
import os
import socket
import sqlite3
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from ptv2_core.errors import PTv2Error

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROMPT_PATH = "artifacts/prompt"
"""Where the prompt lies inside a registered model."""

SHA256_TAG = "prompt_sha256"
"""The tag of a model version that holds the sha256 of its prompt.safetensors."""

DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
EXPECTED_URI = "expected sqlite:///FILE, postgresql://..., mysql://..., mssql://..., http(s)://..."

MANIFEST_TAG = "manifest_sha256"
"""Likewise of its prompt.json."""

SIGNATURE_TAG = "ptv2.signature"
"""Likewise the signature of its prompt.json."""

REQUEST_TIMEOUT_S = 5
REQUEST_RETRIES = 1


class StoreError(PTv2Error):
    """A registry that cannot be reached or read, or a place that must not be overwritten."""


class StoreUnreachableError(StoreError):
    """A registry that does not answer; it may later."""


class ConflictError(StoreError):
    """Somebody else changed what was to be changed."""


def resolve_uri(uri: str, *, root: Path) -> str:
    """Return `uri` with a relative SQLite path made absolute under `root`.

    Args:
        uri: A tracking URI as MLflow takes it.
        root: The workspace, or the current folder.

    Raises:
        StoreError: The URI is of no kind that holds a registry.
    """
    scheme = _scheme(uri)
    if scheme == "sqlite":
        path = sqlite_path(uri)
        return f"sqlite:///{(root.absolute() / path) if path else ''}"
    if scheme not in ("http", "https", *DEFAULT_PORTS) or not urlsplit(uri).hostname:
        raise StoreError(
            f"the registry {shown(uri)!r} cannot be used; {EXPECTED_URI}. Mend "
            "register.tracking_uri of params.yaml, or MLFLOW_TRACKING_URI."
        )
    return uri.rstrip("/")


def check_answers(uri: str, *, must_exist: bool = False, timeout_s: float = 3.0) -> None:
    """Fail within seconds when the registry at a resolved `uri` is away or unusable.

    Args:
        uri: What `resolve_uri` returned.
        must_exist: Whether a SQLite database that is not there is an error.
        timeout_s: How long to wait for a server.

    Raises:
        StoreError: Saying what is wrong and what to do about it.
    """
    scheme = _scheme(uri)
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if path:
            _check_sqlite(path, must_exist=must_exist)
    elif scheme in DEFAULT_PORTS:
        _check_port(uri, timeout_s)
    else:
        _check_health(uri, timeout_s)


def connect(uri: str) -> "MlflowClient":
    """Return a client of the registry at a resolved `uri` that does not wait for minutes.

    Raises:
        StoreError: The registry is a database, which the small MLflow cannot read.
    """
    if not uri.startswith("http") and importlib.util.find_spec("sqlalchemy") is None:
        raise StoreError(
            f"the registry {shown(uri)} is a database, which needs the whole of MLflow: install "
            "`ptv2[pipelines]`, or name an MLflow server (http://...)."
        )
    from mlflow import MlflowClient
    from mlflow.environment_variables import (
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
    )

    # MLflow takes these from nowhere else; what the user set stays
    for variable, value in (
        (MLFLOW_HTTP_REQUEST_MAX_RETRIES, REQUEST_RETRIES),
        (MLFLOW_HTTP_REQUEST_TIMEOUT, REQUEST_TIMEOUT_S),
    ):
        if not variable.is_set():  # type: ignore[no-untyped-call]
            variable.set(value)  # type: ignore[no-untyped-call]
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def as_store_errors(uri: str, doing: str) -> Iterator[None]:
    """Turn what MLflow and its transports raise into one message for the user.

    Args:
        uri: The registry.
        doing: What could not be done, such as "the prompt could not be pulled".

    Raises:
        StoreUnreachableError: The registry does not answer.
        StoreError: It refuses.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"{doing} ({shown(uri)}): {lines[0][:500]}"
        code = getattr(error, "error_code", "")
        # MLflow wraps what the network raised, and keeps only its text
        is_away = code == "TEMPORARILY_UNAVAILABLE" or lines[0].startswith("API request to http")
        is_away |= isinstance(error, ConnectionError | TimeoutError)
        raise (StoreUnreachableError if is_away else StoreError)(text) from error


def shown(uri: str) -> str:
    """Return `uri` without a password, for messages and files."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    user, host = parts.netloc.rsplit("@", 1)
    return urlunsplit(parts._replace(netloc=f"{user.split(':')[0]}:***@{host}"))


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a `sqlite:///` URI; None for a database in memory."""
    name = unquote(uri.partition(":///")[2].partition("?")[0])
    return None if name in ("", ":memory:") else Path(name)


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Keep MLflow's and Alembic's progress messages off the terminal; errors still show."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _scheme(uri: str) -> str:
    """Return the scheme without a driver: `postgresql` for `postgresql+psycopg2://...`."""
    return uri.partition(":")[0].partition("+")[0].lower() if "://" in uri else ""


def _check_sqlite(path: Path, *, must_exist: bool) -> None:
    if not path.exists():
        if must_exist:
            raise StoreError(
                f"no registry: there is no database {path}. Register a prompt first, run in the "
                "workspace it was registered from, or set MLFLOW_TRACKING_URI."
            )
        if not path.parent.is_dir():
            raise StoreError(
                f"the registry's database {path} cannot be created: expected a folder "
                f"{path.parent}. Create it, or mend register.tracking_uri of params.yaml."
            )
        if not os.access(path.parent, os.W_OK):
            raise StoreError(
                f"the registry's database {path} cannot be created: no write access to "
                f"{path.parent}. Change its permissions, or register.tracking_uri of params.yaml."
            )
        return
    if not must_exist and not os.access(path, os.W_OK):
        raise StoreError(
            f"the registry's database {path} is read-only. Make it writable, or change "
            "register.tracking_uri of params.yaml."
        )
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in rows}
    except sqlite3.Error as error:
        raise StoreError(
            f"the registry's database {path} cannot be read as SQLite: {error}. Restore it from a "
            "backup, or move it away to start an empty registry."
        ) from error
    if tables and "registered_models" not in tables:
        raise StoreError(
            f"the database {path} is not a registry of MLflow's: it has no table "
            "registered_models. Mend register.tracking_uri of params.yaml, or MLFLOW_TRACKING_URI."
        )


def _check_port(uri: str, timeout_s: float) -> None:
    parts = urlsplit(uri)
    address = (str(parts.hostname), parts.port or DEFAULT_PORTS[_scheme(uri)])
    try:
        with socket.create_connection(address, timeout=timeout_s):
            return
    except OSError as error:
        raise _unreachable(uri, str(error)) from error


def _check_health(uri: str, timeout_s: float) -> None:
    parts = urlsplit(uri)
    # A name and password in the address are for MLflow; urllib takes them for a part of the host.
    address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=timeout_s):
            return
    except urllib.error.HTTPError as error:
        # Any answer below 500 comes from a live server; whether it lets us in is for MLflow to say.
        if error.code >= 500:
            raise _unreachable(uri, f"HTTP {error.code} {error.reason}") from error
    except OSError as error:
        raise _unreachable(uri, str(getattr(error, "reason", error))) from error


def _unreachable(uri: str, reason: str) -> StoreUnreachableError:
    return StoreUnreachableError(
        f"the registry {shown(uri)} does not answer: {reason}. Start its server, check the "
        "network, or mend register.tracking_uri of params.yaml (MLFLOW_TRACKING_URI wins over it)."
    )
