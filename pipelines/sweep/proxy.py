"""Optuna's gRPC proxy: one process writes a SQLite database, for trials that train anywhere.

Run as `python -m pipelines.sweep.proxy URL HOST PORT`. It asks for no password, as Ray and Dask do
not, so it listens on this machine alone, unless the cluster is elsewhere.
"""

import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage

from pipelines import guarded
from pipelines.errors import PipelineError
from pipelines.local_servers import POLL_S, STARTUP_TIMEOUT_S, free_port, last_lines
from pipelines.settings import child_environment
from pipelines.sweep.storages import open_storage
from pipelines.sweep.urls import is_loopback

LOOPBACK = "127.0.0.1"
WATCH_S = 0.2


@contextmanager
def one_writer(url: str, *, towards: str | None, log: Path) -> Iterator[str]:
    """Yield the URL of a proxy in front of a database; it ends with this process, however it does.

    One that dies is started again: those who ask it wait meanwhile.

    Args:
        url: Of a database that one process may write at a time.
        towards: The host that those who ask are on; None: this one.
        log: Written anew with what the proxy says.

    Raises:
        PipelineError: It does not start.
    """
    host, port = listening_address(towards), free_port()
    command = [sys.executable, "-m", "pipelines.sweep.proxy", url, host, str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    over = threading.Event()

    def start() -> "Popen[str]":
        with log.open("a", encoding="utf-8") as output:
            return guarded.start(
                command, cwd=Path.cwd(), environment=child_environment(), output=output
            )

    def keep(process: "Popen[str]") -> None:
        while not over.wait(WATCH_S):
            if process.poll() is not None:
                process = start()
        guarded.stop(process)
        process.wait()

    first = start()
    keeper = threading.Thread(target=keep, args=(first,), name="proxy", daemon=True)
    try:
        _wait_until_listening(host, port, first, log)
        keeper.start()
        yield f"grpc://{host}:{port}"
    finally:
        over.set()
        if keeper.ident is None:
            guarded.stop(first)
            first.wait()
        else:
            keeper.join()


def _wait_until_listening(host: str, port: int, process: "Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            time.sleep(POLL_S)
    how = "ended" if process.poll() is not None else f"did not answer in {STARTUP_TIMEOUT_S:g} s"
    raise PipelineError("\n".join([f"Optuna's gRPC proxy {how}; {log} says:", *last_lines(log)]))


def listening_address(towards: str | None) -> str:
    """Return the address of this machine under which a host reaches it."""
    if towards is None:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # sends nothing: the kernel chooses the interface
        probe.connect((towards, 9))
        found = str(probe.getsockname()[0])
    return LOOPBACK if is_loopback(found) else found


class _Outspoken:
    """A storage whose errors say what caused them, which gRPC leaves out."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)

        def call(*values: Any, **named: Any) -> Any:
            try:
                return found(*values, **named)
            except optuna.exceptions.StorageInternalError as error:
                raise optuna.exceptions.StorageInternalError(error.__cause__ or error) from error

        return call


def main(url: str, host: str, port: str) -> None:
    """Serve until the end of the process."""
    # it is pinned, and tested with that version
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    # kept in memory by its only writer, since SQLite answers a hundred times slower
    cached = optuna.storages.get_storage(open_storage(url))
    storage = cast(BaseStorage, _Outspoken(cached))
    with suppress(KeyboardInterrupt):
        optuna.storages.run_grpc_proxy_server(storage, host=host, port=int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
