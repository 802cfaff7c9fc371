"""Prefect servers on this machine whose database is in the workspace.

`temporary_server` is for the length of one run, for those who have no server of their own. A flow
without a server would start one anyway, and each of its child processes another. This one is shared
by all, ends with this process, and keeps its database, so that `ptv2 up` shows the run later.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import guarded
from pipelines.local_servers import free_port, wait_until_healthy
from pipelines.settings import child_environment

HOME = Path(".ptv2") / "prefect"
LEASE_STORAGE = "prefect.server.concurrency.lease_storage.filesystem"
"""Keeps who holds a slot of a limit, and until when, under PREFECT_HOME."""


@contextmanager
def temporary_server(root: Path, *, schedules: bool = False) -> Iterator[str]:
    """Yield the API URL of a server whose database is under `root`.

    Args:
        root: The workspace; the database is in its `.ptv2/prefect`.
        schedules: Whether deployments run by their schedules while the server is there.

    Raises:
        PipelineError: If the server does not come up.
    """
    home = home_of(root)
    port = free_port()
    url = api_url(port)
    log = home / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = guarded.start(
            server_command(port, ui=False),
            cwd=home,
            environment=server_environment(home, schedules=schedules),
            output=output,
        )
    try:
        wait_until_healthy("the temporary Prefect server", f"{url}/health", process, log)
        yield url
    finally:
        guarded.stop(process)
        process.wait()


def home_of(root: Path) -> Path:
    """Return the folder of a workspace's Prefect database; makes it."""
    home = (root / HOME).resolve()
    home.mkdir(parents=True, exist_ok=True)
    return home


def api_url(port: int) -> str:
    """Return what PREFECT_API_URL has to be for a server on this machine."""
    return f"http://127.0.0.1:{port}/api"


def server_command(port: int, *, ui: bool) -> list[str]:
    """Return the command of a server that only this machine can reach."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--ui" if ui else "--no-ui"]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]


def server_environment(home: Path, *, schedules: bool) -> dict[str, str]:
    """Return a server's environment: its own database, no telemetry, schedules or none."""
    switch = "true" if schedules else "false"
    return child_environment(
        {
            "PREFECT_HOME": str(home),
            # its own services must not talk to the server that a user has elsewhere
            "PREFECT_API_URL": "",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # in memory, a restart would end runs that hold a slot, or leave their slots taken
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASE_STORAGE,
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": switch,
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": switch,
            "DO_NOT_TRACK": "1",
        }
    )
