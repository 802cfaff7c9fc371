"""Optuna: the database of a study, at its URL, and patience while it is away."""

import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import DBAPIError

from pipelines.errors import PipelineError
from pipelines.settings import set_environment_defaults
from pipelines.sweep.urls import shown

LOST_FOR_S = 120.0
"""How long a database may be away: a restart takes seconds, a failover a minute."""

T = TypeVar("T")


@lru_cache
def open_storage(url: str) -> BaseStorage:
    """Return the database at a URL; the threads of a process share it.

    Raises:
        PipelineError: It does not answer, or cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url.startswith("grpc://"):
        return _open_proxy(url)
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        engine: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        engine = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
    try:
        return RDBStorage(url, engine_kwargs=engine)
    except (DBAPIError, ImportError, sqlalchemy.exc.ArgumentError) as error:
        hint = ""
        if isinstance(error, ImportError):
            hint = "; install its driver, for PostgreSQL with `pip install 'ptv2[postgres]'`"
        raise PipelineError(f"sweep.storage: {shown(url)}: {_first_line(error)}{hint}") from error


def _open_proxy(url: str) -> BaseStorage:
    host, _, port = url.removeprefix("grpc://").rpartition(":")
    if not (host and port.isdecimal()):
        raise PipelineError(f"sweep.storage: expected grpc://HOST:PORT, got {url}")
    # what http_proxy is set for lies further away than a study's database
    set_environment_defaults({"no_grpc_proxy": host})
    try:
        with warnings.catch_warnings():
            # it is pinned, and tested with that version
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return cast(BaseStorage, optuna.storages.GrpcStorageProxy(host=host, port=int(port)))
    except ImportError as error:
        raise PipelineError(
            f"sweep.storage: {url} needs a package that is not installed ({error.name}); install "
            "it with `pip install grpcio`"
        ) from error


def patiently(call: Callable[[], T]) -> T:
    """Call what asks the database, again and again while it is away.

    Raises:
        PipelineError: It stays away, or cannot be written.
    """
    deadline = time.monotonic() + LOST_FOR_S
    wait_s = 0.1
    while True:
        try:
            return call()
        except _away() as error:
            said = _first_line(error)
            # SQLite calls all but a full disk, such as a quota, an error of the disk
            finals = ("is full", "readonly", "No space left", "disk I/O error")
            is_full = any(words in said for words in finals)
            if is_full or time.monotonic() > deadline:
                raise PipelineError(
                    f"the study's database cannot be used: {said}; no finished trial is lost: mend "
                    "it, and the same command goes on"
                ) from error
        time.sleep(wait_s)
        wait_s = min(wait_s * 2, 5.0)


@lru_cache
def _away() -> tuple[type[BaseException], ...]:
    """Return what is raised while a database is away; gRPC's only where gRPC is installed."""
    found: tuple[type[BaseException], ...] = (DBAPIError, optuna.exceptions.StorageInternalError)
    try:
        import grpc
    except ImportError:
        return found
    return (*found, grpc.RpcError)


def _first_line(error: BaseException) -> str:
    # the text of an error of gRPC begins with a table of its parts
    told = getattr(error, "details", None)
    words = str(told() if callable(told) else error.__cause__ or error)
    lines = words.removeprefix("Exception calling application: ").strip().splitlines()
    return lines[0] if lines else type(error).__name__
