"""A Prefect server for the length of one run, for those who have none of their own.

A flow without a server would start one anyway, and each of its child processes another. This one is
shared by all, ends with this process, and keeps its database, so that a run can be looked at later:

    PREFECT_HOME=.ptv2/prefect prefect server start
"""

import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from pipelines import guarded
from pipelines.errors import PipelineError
from pipelines.settings import child_environment

STARTUP_TIMEOUT_S = 120.0
POLL_S = 0.1
HOME = Path(".ptv2") / "prefect"
LOG_TAIL = 20


@contextmanager
def temporary_server(root: Path) -> Iterator[str]:
    """Yield the API URL of a server whose database is under `root`.

    Args:
        root: The workspace; the database is in its `.ptv2/prefect`.

    Raises:
        PipelineError: If the server does not come up.
    """
    home = (root / HOME).resolve()
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    log = home / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = guarded.start(command, cwd=home, environment=_environment(home), output=output)
    try:
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        guarded.stop(process)
        process.wait()


def _environment(home: Path) -> dict[str, str]:
    """Return the server's environment: its own database, no telemetry, nothing scheduled."""
    return child_environment(
        {
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_until_healthy(url: str, process: "Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if _is_healthy(url):
            return
        time.sleep(POLL_S)
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
    how = "ended" if process.poll() is not None else f"did not answer in {STARTUP_TIMEOUT_S:g} s"
    raise PipelineError("\n".join([f"the temporary Prefect server {how}; {log} says:", *said]))


def _is_healthy(url: str) -> bool:
    # Not through a proxy of the environment: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
