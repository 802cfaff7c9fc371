"""A sweep over two machines: two network namespaces with an address each and nothing else shared.

The files are the same on both, as a cluster's file system makes them. Nothing on the loopback of
one can be reached from the other.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines.errors import PipelineError
from pipelines.local_servers import free_port, is_healthy
from pipelines.prefect_server import server_command, server_environment
from pipelines.sweep.record import SweepRecord
from tests.pipelines import postgres
from tests.pipelines.processes import Running, environment, processes, program
from tests.pipelines.sweep_engine import run_sweep
from tests.pipelines.test_sweep_engines import sweep_on
from tests.pipelines.test_sweep_pool import deploy, sweep_on_pool, what_was_found

HERE, THERE = "10.213.7.1", "10.213.7.2"
NAMESPACE = "ptv2-there"
CHANGES: dict[str, Any] = {"n_trials": 3, "workers": 1, "finalists": 1, "seeds": 1}
HOST_COMMAND = "pipelines.sweep.host"


def can_part_networks() -> bool:
    """Tell whether this user may make a network namespace."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", f"{NAMESPACE}-try"], capture_output=True)
    subprocess.run(["ip", "netns", "delete", f"{NAMESPACE}-try"], capture_output=True)
    return made.returncode == 0


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not can_part_networks(), reason="needs root and network namespaces"),
]


def there(*command: str) -> tuple[str, ...]:
    """Return a command that runs on the other machine."""
    return ("ip", "netns", "exec", NAMESPACE, *command)


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    """Two machines and a wire between them."""
    wire, end = "ptv2-here", "ptv2-end"
    steps = (
        f"ip netns add {NAMESPACE}",
        f"ip link add {wire} type veth peer name {end}",
        f"ip link set {end} netns {NAMESPACE}",
        f"ip address add {HERE}/30 dev {wire}",
        f"ip link set {wire} up",
        f"ip -n {NAMESPACE} address add {THERE}/30 dev {end}",
        f"ip -n {NAMESPACE} link set {end} up",
        f"ip -n {NAMESPACE} link set lo up",
    )
    try:
        for step in steps:
            subprocess.run(step.split(), check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=False)
        subprocess.run(["ip", "link", "delete", wire], check=False, capture_output=True)


@contextmanager
def started(root: Path, *command: str, **variables: str) -> Iterator[Running]:
    """Run something beside a test, in the workspace."""
    made = Running(root, *command, environment={**environment(), **variables})
    try:
        yield made
    finally:
        made.kill_all()


@pytest.fixture(scope="module")
def api(machines: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that both machines reach."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    command = [HERE if one == "127.0.0.1" else one for one in server_command(port, ui=False)]
    with started(home, *command, **server_environment(home, schedules=True)):
        deadline = time.monotonic() + 120
        while not is_healthy(f"http://{HERE}:{port}/api/health"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://{HERE}:{port}/api"


@pytest.fixture(scope="module")
def by_threads(sweepable: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    root = shutil.copytree(sweepable, tmp_path_factory.mktemp("threads") / "space")
    return run_sweep(root, **CHANGES)


@contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    """Start Dask's scheduler on the other machine; yields its address."""
    port = free_port()
    command = there(
        program("dask"), "scheduler", "--host", THERE, "--port", str(port), "--no-dashboard"
    )
    with started(folder, *command) as running:
        running.wait_until(lambda: "Scheduler at" in running.said)
        yield f"tcp://{THERE}:{port}"


@dataclass(kw_only=True)
class Seen:
    """Where trials were trained."""

    networks: set[str]

    def look(self, root: Path) -> None:
        for pid, command in processes(root).items():
            if HOST_COMMAND in command:
                try:
                    self.networks.add(os.readlink(f"/proc/{pid}/ns/net"))
                except OSError:
                    continue


def network_there() -> str:
    done = subprocess.run(
        there("readlink", "/proc/self/ns/net"), check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_machines_of_a_dask_cluster_train_for_a_sweep_elsewhere(
    api: str, sweepable: Path, tmp_path: Path, by_threads: SweepRecord
) -> None:
    """The study is SQLite on the sweep's machine, behind the proxy, which faces the cluster."""
    pytest.importorskip("prefect_dask", reason="needs `pip install 'ptv2[dask]'`")
    root = shutil.copytree(sweepable, tmp_path / "space")
    seen = Seen(networks=set())
    with scheduler(tmp_path) as address:
        worker = there(
            program("dask"), "worker", address, "--host", THERE, "--nthreads", "1",
            "--no-dashboard",
        )  # fmt: skip
        with (
            started(root, *worker, OMP_NUM_THREADS="1"),
            temporary_settings({PREFECT_API_URL: api}),
        ):
            record = sweep_on(
                root, "dask", lambda look: seen.look(root), **CHANGES, address=address
            )
    assert what_was_found(record) == what_was_found(by_threads)
    assert seen.networks == {network_there()}


def test_machines_elsewhere_need_a_prefect_server_that_they_can_reach(
    machines: None, sweepable: Path, tmp_path: Path
) -> None:
    pytest.importorskip("prefect_dask", reason="needs `pip install 'ptv2[dask]'`")
    root = shutil.copytree(sweepable, tmp_path / "space")
    with (
        scheduler(tmp_path) as address,
        pytest.raises(PipelineError, match="those cannot reach Prefect at http://127"),
    ):
        sweep_on(root, "dask", **CHANGES, address=address)


@pytest.mark.skipif(not postgres.is_possible(), reason="needs PostgreSQL's programs")
def test_machines_that_are_prefect_workers_train_with_a_study_in_postgresql(
    api: str,
    sweepable: Path,
    tmp_path: Path,
    by_threads: SweepRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("psycopg2", reason="needs `pip install 'ptv2[postgres]'`")
    prefect = {"PREFECT_API_URL": api, "PREFECT_HOME": str(tmp_path / "home")}
    root = deploy(sweepable, tmp_path / "space", prefect)
    worker = there(program("prefect"), "worker", "start", "--pool", "ptv2", "--type", "process")
    seen = Seen(networks=set())
    with postgres.server(host=HERE) as database:
        url = database.new_database()
        monkeypatch.setenv("PTV2_STORAGE", url)
        variables = {**prefect, "PTV2_STORAGE": url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
        with (
            started(root, *worker, **variables),
            temporary_settings({PREFECT_API_URL: api}),
        ):
            record = sweep_on_pool(root, "two machines", lambda look: seen.look(root))
    assert what_was_found(record) == what_was_found(by_threads)
    assert seen.networks == {network_there()}
