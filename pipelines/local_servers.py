"""Servers on the loopback of this machine: a port for each, and the wait until one answers."""

import socket
import time
import urllib.request
from pathlib import Path
from subprocess import Popen

from pipelines.errors import PipelineError

STARTUP_TIMEOUT_S = 120.0
POLL_S = 0.1
LOG_TAIL = 20
HOST = "127.0.0.1"


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
    return port


def is_free(port: int) -> bool:
    """Tell whether a server could listen on a port."""
    with socket.socket() as listener:
        # as servers do: a port whose last connections are still closing is free
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
    return True


def wait_until_healthy(name: str, address: str, process: "Popen[str]", log: Path) -> None:
    """Wait until a server that was just started answers.

    Args:
        name: The server, as it is called in an error.
        address: What answers with status 200 once the server is there.
        process: The server.
        log: What it writes.

    Raises:
        PipelineError: It ended, or did not answer in time; with its last lines.
    """
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if is_healthy(address):
            return
        time.sleep(POLL_S)
    how = "ended" if process.poll() is not None else f"did not answer in {STARTUP_TIMEOUT_S:g} s"
    raise PipelineError("\n".join([f"{name} {how}; {log} says:", *last_lines(log)]))


def is_healthy(address: str) -> bool:
    """Tell whether a server on this machine answers with status 200."""
    # Not through a proxy of the environment: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def last_lines(log: Path) -> list[str]:
    """Return the end of a log."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
