"""`ptv2 up`: the pages of Prefect, MLflow and Optuna Dashboard together, on this machine alone.

Each is a server of its own, started through `guarded`: all end with this process, however it ends.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines import guarded, prefect_server
from pipelines.errors import PipelineError
from pipelines.interrupts import terminate_as_interrupt
from pipelines.local_servers import HOST, free_port, is_free, last_lines, wait_until_healthy
from pipelines.settings import Settings, child_environment, read_environment
from pipelines.sweep.urls import with_driver
from ptv2_core.errors import ConfigError
from ptv2_core.files import locked
from ptv2_serving.tracking import resolve_uri, shown

FOLDER = Path(".ptv2") / "up"
SWEEPS = Path(".ptv2") / "sweeps.db"
WATCH_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where the pages are; 0 is any port that is free."""

    prefect: int
    mlflow: int
    optuna: int


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server with a page.

    Attributes:
        name: The server.
        command: What starts it.
        folder: Where it runs.
        environment: Its whole environment.
        page: The address that a browser opens.
        health: The address that answers once it is there.
    """

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    page: str
    health: str


def run(settings: Settings, ports: Ports, console: Console) -> None:
    """Start the pages, say where they are, and stop them all on Ctrl-C or SIGTERM.

    Args:
        settings: A checked params.yaml.
        ports: Where the pages are to be.
        console: Where to say so.

    Raises:
        ConfigError: A port is taken.
        PipelineError: A server did not start or has died; the others are stopped.
    """
    root = settings.root.resolve()
    with _alone(root):
        found = _free_ports(ports)
        optuna, missing = _optuna(settings, root, found.optuna)
        services = [_prefect(root, found.prefect), *_mlflow(settings, root, found.mlflow), *optuna]
        with terminate_as_interrupt(), _running(services, root) as processes:
            try:
                for service, process in processes:
                    log = _log(root, service)
                    wait_until_healthy(service.name, service.health, process, log)
                console.print(_table(services))
                for line in [*missing, *_advice(settings, found)]:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                _watch(processes, root)
            except KeyboardInterrupt:
                console.print("stopping", highlight=False)
    console.print("stopped", highlight=False)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the workspace's lock: two servers would write one Prefect database."""
    try:
        with locked(root / FOLDER / "lock", wait=False):
            yield
    except BlockingIOError as error:
        raise PipelineError(
            f"another `ptv2 up` serves {root} already; stop it, or use its pages"
        ) from error


def _free_ports(ports: Ports) -> Ports:
    """Check the ports that were asked for, and choose those that were not.

    Raises:
        ConfigError: Naming every option whose port is taken.
    """
    asked = {name: getattr(ports, name) for name in ("prefect", "mlflow", "optuna")}
    chosen: dict[str, int] = {}
    problems = []
    for name, port in asked.items():
        option = f"--{name}-port"
        if port == 0:
            taken = {*chosen.values(), *asked.values()}
            chosen[name] = next(other for other in iter(free_port, None) if other not in taken)
        elif port in chosen.values():
            problems.append((option, f"expected a port for each page, got {port} twice"))
        elif not is_free(port):
            advice = "give another port, or 0 for any that is free"
            problems.append((option, f"expected a free port, got {port}, which is taken; {advice}"))
        else:
            chosen[name] = port
    if problems:
        raise ConfigError(problems)
    return Ports(**chosen)


def _prefect(root: Path, port: int) -> Service:
    home = prefect_server.home_of(root)
    url = prefect_server.api_url(port)
    environment = prefect_server.server_environment(home, schedules=True)
    return Service(
        name="Prefect",
        command=prefect_server.server_command(port, ui=True),
        folder=home,
        # what the page calls from the browser
        environment={**environment, "PREFECT_UI_API_URL": url},
        page=f"http://{HOST}:{port}",
        health=f"{url}/health",
    )


def _mlflow(settings: Settings, root: Path, port: int) -> list[Service]:
    """Return MLflow's pages; none for a registry that is a server, which has its own."""
    uri = _registry(settings)
    if uri.startswith("http"):
        return []
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1"]
    address = f"http://{HOST}:{port}"
    return [
        Service(
            name="MLflow",
            command=[*command, "--host", HOST, "--port", str(port)],
            folder=root,
            # not on the command line, which every list of processes shows: it may have a password
            environment=child_environment(
                {
                    "MLFLOW_BACKEND_STORE_URI": resolve_uri(uri, root=root),
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    # only its pages are used; the workers of its jobs would be five more processes
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                }
            ),
            page=address,
            health=f"{address}/health",
        )
    ]


def _optuna(settings: Settings, root: Path, port: int) -> tuple[list[Service], list[str]]:
    """Return Optuna Dashboard on the sweeps; or none, and why."""
    program = shutil.which("optuna-dashboard", path=child_environment()["PATH"])
    if program is None:
        return [], ["no Optuna Dashboard: install it with `pip install 'optuna-dashboard>=0.21'`"]
    storage = read_environment().storage or settings.sweep.storage
    if storage is None and not (root / SWEEPS).is_file():
        where = f"{SWEEPS} is not there yet"
        return [], [f"no Optuna Dashboard: {where}; run `ptv2 sweep`, then this command again"]
    if storage is not None and storage.startswith("grpc://"):
        where = "start it where the database itself is"
        return [], [f"no Optuna Dashboard: it cannot ask {storage}; {where}"]
    url = with_driver(storage) if storage else f"sqlite:///{root / SWEEPS}"
    # not on the command line, likewise
    file = root / FOLDER / "optuna-dashboard.toml"
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as stream:
        stream.write(f"[optuna_dashboard]\nstorage = {json.dumps(url, ensure_ascii=False)}\n")
    address = f"http://{HOST}:{port}"
    command = [program, "--from-config", str(file), "--host", HOST, "--port", str(port)]
    service = Service(
        name="Optuna Dashboard",
        command=[*command, "--server", "wsgiref", "--quiet"],
        folder=root,
        environment=child_environment(),
        page=f"{address}/dashboard",
        health=f"{address}/api/meta",
    )
    return [service], []


def _registry(settings: Settings) -> str:
    return read_environment().mlflow_tracking_uri or settings.register.tracking_uri


@contextmanager
def _running(
    services: Sequence[Service], root: Path
) -> Iterator[list[tuple[Service, "Popen[str]"]]]:
    """Start all servers, and stop them all together."""
    processes: list[tuple[Service, Popen[str]]] = []
    try:
        for service in services:
            with _log(root, service).open("w", encoding="utf-8") as output:
                process = guarded.start(
                    service.command,
                    cwd=service.folder,
                    environment=service.environment,
                    output=output,
                )
            processes.append((service, process))
        yield processes
    finally:
        for _, process in processes:
            guarded.stop(process)
        for _, process in processes:
            process.wait()


def _watch(processes: Sequence[tuple[Service, "Popen[str]"]], root: Path) -> NoReturn:
    """Wait until a server dies.

    Raises:
        PipelineError: One has, with its last lines.
    """
    while True:
        for service, process in processes:
            status = process.poll()
            if status is not None:
                log = _log(root, service)
                head = f"{service.name} has ended with status {status}, so all are stopped; "
                raise PipelineError("\n".join([f"{head}{log} says:", *last_lines(log)]))
        time.sleep(WATCH_S)


def _log(root: Path, service: Service) -> Path:
    return root / FOLDER / f"{service.name.lower().replace(' ', '-')}.log"


def _table(services: Sequence[Service]) -> Table:
    table = Table(title="ptv2 up", title_justify="left")
    for header in ("page", "address"):
        table.add_column(header, no_wrap=True)
    for service in services:
        table.add_row(Text(service.name), Text(service.page))
    return table


def _advice(settings: Settings, ports: Ports) -> list[str]:
    uri = _registry(settings)
    elsewhere = [f"MLflow is at {shown(uri)}"] if uri.startswith("http") else []
    return [
        *elsewhere,
        "runs and sweeps of another shell appear here after",
        f"  export PREFECT_API_URL={prefect_server.api_url(ports.prefect)}",
        "schedules:",
        "  prefect work-pool create ptv2 --type process",
        "  prefect --no-prompt deploy --all",
        "  prefect worker start --pool ptv2 --type process",
        "Ctrl-C stops all of it",
    ]
