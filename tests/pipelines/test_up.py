"""`ptv2 up` with the real servers: pages answer, and nothing is left whichever way it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import optuna
import pytest

from pipelines.local_servers import HOST
from tests.pipelines.processes import Running, environment, processes, program
from tests.stage_parts import PARAMS, write_params

pytestmark = pytest.mark.slow

ANY_PORTS = ("--prefect-port", "0", "--mlflow-port", "0", "--optuna-port", "0")


def up(root: Path, *arguments: str, **variables: str) -> Running:
    running = Running(root, program(), "up", *arguments, environment={**environment(), **variables})
    running.wait_until(lambda: "Ctrl-C stops all of it" in running.said)
    return running


def pages(running: Running) -> dict[str, str]:
    """Return the addresses of the printed table by page."""
    rows = re.findall(r"│ ([A-Z][\w ]+?) +│ (http\S+)", running.said)
    return dict(rows)


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as response:
        assert response.status == 200
        return str(response.read().decode())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with one sweep."""
    root = tmp_path_factory.mktemp("up") / "workspace"
    (root / ".ptv2").mkdir(parents=True)
    write_params(root, PARAMS)
    study = optuna.create_study(
        study_name="sweep of intents", storage=f"sqlite:///{root / '.ptv2' / 'sweeps.db'}"
    )
    study.optimize(lambda trial: trial.suggest_float("learning_rate", 0.0, 1.0), n_trials=2)
    return root


@pytest.fixture
def running(workspace: Path) -> Iterator[Running]:
    started = up(workspace, *ANY_PORTS)
    yield started
    with suppress(ProcessLookupError):
        started.kill_all()


def test_up_shows_three_pages_and_stops_all_when_one_dies(
    workspace: Path, running: Running
) -> None:
    found = pages(running)
    assert list(found) == ["Prefect", "MLflow", "Optuna Dashboard"]
    assert "Prefect" in get(found["Prefect"])
    assert "MLflow" in get(found["MLflow"])
    assert "Optuna Dashboard" in get(found["Optuna Dashboard"])
    studies = json.loads(get(found["Optuna Dashboard"].replace("/dashboard", "/api/studies")))
    assert [study["study_name"] for study in studies["study_summaries"]] == ["sweep of intents"]
    api = f"{found['Prefect']}/api"
    assert f"export PREFECT_API_URL={api}" in running.said
    assert json.loads(get(f"{found['Prefect']}/ui-settings"))["api_url"] == api
    assert (workspace / ".ptv2" / "prefect" / "prefect.db").is_file()
    storage = workspace / ".ptv2" / "up" / "optuna-dashboard.toml"
    assert storage.stat().st_mode & 0o777 == 0o600, "it may hold a password"

    again = subprocess.run(
        [program(), "up", *ANY_PORTS],
        cwd=workspace, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 1
    assert "another `ptv2 up` serves" in again.stderr

    (mlflow,) = (
        pid
        for pid, line in processes(workspace).items()
        if "-m mlflow ui" in line and "guarded.py" not in line
    )
    os.kill(mlflow, signal.SIGKILL)
    assert running.wait() == 1
    assert "error: MLflow has ended with status 137, so all are stopped; " in running.said
    assert "mlflow.log says:" in running.said
    assert "Traceback" not in running.said.partition("says:")[0]
    assert processes(workspace) == {}


def test_up_leaves_no_process_when_it_is_killed(workspace: Path) -> None:
    running = Running(workspace, program(), "up", *ANY_PORTS, environment=environment())
    running.wait_until(lambda: len(servers(workspace)) == 3)
    running.kill()
    running.wait_until_all_is_gone(60)


def servers(root: Path) -> set[str]:
    """Return what runs of the three servers."""
    lines = [line for line in processes(root).values() if "guarded.py" not in line]
    names = ("prefect server start", "-m mlflow ui", "optuna-dashboard")
    return {name for name in names for line in lines if name in line}


def test_up_serves_what_there_is_and_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    root.mkdir()
    write_params(root, PARAMS)
    elsewhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "PTV2_STORAGE": "grpc://127.0.0.1:9"}
    running = up(root, *ANY_PORTS, **elsewhere)
    try:
        assert list(pages(running)) == ["Prefect"]
        assert "no Optuna Dashboard: it cannot ask grpc://127.0.0.1:9; start it" in running.said
        assert "MLflow is at http://127.0.0.1:9" in running.said
        assert running.interrupt() == 0
    finally:
        with suppress(ProcessLookupError):
            running.kill_all()
    assert running.said.endswith("stopping\nstopped\n")
    assert processes(root) == {}


def test_up_says_which_option_names_a_port_that_is_taken(workspace: Path) -> None:
    with closing(socket.socket()) as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = subprocess.run(
            [program(), "up", "--prefect-port", "0", "--mlflow-port", str(port)],
            cwd=workspace, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert (
        f"--mlflow-port: expected a free port, got {port}, which is taken; give another port, "
        "or 0 for any that is free"
    ) in done.stderr
    assert processes(workspace) == {}
