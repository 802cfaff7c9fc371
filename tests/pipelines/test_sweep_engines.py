"""A sweep on a local Ray and a local Dask cluster is the sweep that threads make."""

import os
import queue
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from pipelines import prefect_session
from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.prefect_session import GPU_TAG
from pipelines.sweep import engines
from pipelines.sweep.job import Job
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.supervise import Ended
from pipelines.sweep.sweeping import Look
from pipelines.sweep.training import Order
from tests.pipelines.processes import is_running, processes
from tests.pipelines.sweep_engine import open_sweep, run_sweep

pytestmark = pytest.mark.slow
TRIALS = 4
PACKAGES = {"ray": "prefect_ray", "dask": "prefect_dask"}
HOST_COMMAND = "pipelines.sweep.host"
PROXY_COMMAND = "pipelines.sweep.proxy"


@pytest.fixture(autouse=True)
def _server(prefect_url: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


@pytest.fixture
def root(sweepable: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sweepable, tmp_path / "space")


@pytest.fixture(scope="module")
def by_threads(
    sweepable: Path, warm_hosts: None, tmp_path_factory: pytest.TempPathFactory
) -> SweepRecord:
    root = shutil.copytree(sweepable, tmp_path_factory.mktemp("threads") / "space")
    return run_sweep(root, n_trials=TRIALS, workers=1, finalists=1)


@pytest.fixture(params=["ray", "dask"])
def engine(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    pytest.importorskip(PACKAGES[name], reason=f"needs `pip install 'ptv2[{name}]'`")
    return name


def sweep_on(
    root: Path, engine: str, on_look: Callable[[Look], None] = lambda look: None, **changes: Any
) -> SweepRecord:
    """Sweep on an engine, as the flow does."""
    settings = {"engine": engine, "n_trials": TRIALS, "workers": 1, "finalists": 1, **changes}
    found: list[SweepRecord] = []

    def work() -> State[Any]:
        with open_sweep(root, **settings) as sweep, engines.submitting(sweep.sweep) as submit:
            found.append(sweep.run(submit, on_look))
        return Completed(message="done")

    with prefect_session.session(root):
        engines.run("a sweep", SweepSettings.model_validate(settings), work).result()
    return found[0]


def left(root: Path) -> dict[int, str]:
    """Return what runs in a workspace, but for Python's own helper of this process."""
    return {
        pid: command
        for pid, command in processes(root).items()
        if "multiprocessing.resource_tracker" not in command
    }


def what_was_found(record: SweepRecord) -> list[tuple[Any, ...]]:
    trials = [(one.number, one.params, one.epochs, one.state, one.origin) for one in record.trials]
    return [*trials, *record.finalists]


def environment() -> dict[str, str]:
    """Return what of this process's environment decides how the workers of a sweep run."""
    prefixes = ("MALLOC_", "PREFECT_", "PYTHONHASHSEED")
    return {
        name: value
        for name, value in os.environ.items()
        if name.endswith("_NUM_THREADS") or name.startswith(prefixes)
    }


def test_engine_finds_what_threads_find_and_leaves_nothing_behind(
    engine: str, root: Path, by_threads: SweepRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    running: set[str] = set()
    before = environment()

    def on_look(look: Look) -> None:
        running.update(processes(root).values())

    record = sweep_on(root, engine, on_look)
    assert what_was_found(record) == what_was_found(by_threads)
    assert any(HOST_COMMAND in command for command in running)
    assert any(PROXY_COMMAND in command for command in running), "SQLite has one writer"
    deadline = time.monotonic() + 20
    while left(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left(root) == {}
    assert capfd.readouterr() == ("", ""), "the terminal is the caller's"
    assert environment() == before, "so is the environment"


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


def test_engine_trains_a_trial_again_whose_worker_is_killed(
    engine: str, root: Path, by_threads: SweepRecord
) -> None:
    killed: list[int] = []

    def kill() -> None:
        while not list((root / ".ptv2" / "sweeps").rglob("trial-1.safetensors")):
            time.sleep(0.005)
        (host,) = (pid for pid, command in processes(root).items() if HOST_COMMAND in command)
        worker = parent_of(host)
        assert worker != os.getpid()
        os.kill(worker, signal.SIGKILL)
        killed.extend([worker, host])

    threading.Thread(target=kill, daemon=True).start()
    record = sweep_on(root, engine)
    assert len(killed) == 2
    assert what_was_found(record) == what_was_found(by_threads)
    assert [one.retries for one in record.trials] == [0, 1, 0, 0]
    assert not any(map(is_running, killed)), "a host ends with its worker"


def order_on(device: str, engine: str) -> Order:
    job = Job(
        params_file="",
        root="",
        task="intents",
        params={},
        checkpoint="",
        device=device,
        shares_forward=engine == "stack",
    )
    return Order(url="", study="", search="", number=0, job=job, retries=0, is_finalist=False)


def task_runs(flow_run: str, count: int) -> dict[str, set[str]]:
    """Return the tags of a flow run's task runs, of which the server hears late."""
    by_name = FlowRunFilter.model_validate({"name": {"any_": [flow_run]}})
    deadline = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=by_name)
            if len(runs) >= count or time.monotonic() > deadline:
                return {one.name: set(one.tags) for one in runs}
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("engine", "device", "limited", "at_once", "tags"),
    [
        ("processes", "cpu", GPU_TAG, 2, {"first": set(), "second": set()}),
        ("processes", "cpu", "trial", 1, {"first": {"trial"}, "second": {"trial"}}),
        ("processes", "cpu", "mine", 1, {"first": {"mine"}, "second": {"mine"}}),
        ("processes", "cuda", GPU_TAG, 1, {"first": {"gpu"}, "second": {"gpu"}}),
        ("stack", "cuda", GPU_TAG, 2, {"first": set(), "second": set(), "stack": {"gpu", "mine"}}),
    ],
)
def test_engine_takes_a_slot_where_trials_or_cards_are_limited(
    engine: str,
    device: str,
    limited: str,
    at_once: int,
    tags: dict[str, set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, active, most = threading.Lock(), 0, 0

    def train(order: Order, on_score: object = None) -> Ended:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(1.0)
        with lock:
            active -= 1
        return Ended(state="complete", seconds=1.0, retries=0, message="")

    monkeypatch.setattr(engines, "train", train)
    sweep = SweepSettings(engine=engine, workers=2)  # type: ignore[arg-type]

    def work() -> State[Any]:
        over: queue.SimpleQueue[str] = queue.SimpleQueue()
        with engines.submitting(sweep) as submit:
            for name in ("first", "second"):
                submit(name, order_on(device, engine), lambda: over.put(""))
            for _ in range(2):
                over.get()
        return Completed(message="done")

    with get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=limited, concurrency_limit=1)
        try:
            with prefect.tags("mine"):
                engines.run(f"{engine} on {device}, {limited}", sweep, work).result()
        finally:
            client.delete_concurrency_limit_by_tag(limited)
    assert most == at_once
    assert task_runs(f"{engine} on {device}, {limited}", len(tags)) == tags


@pytest.mark.parametrize(
    ("server", "address", "certificates"),
    [
        ("http://127.0.0.1:4200/api", None, 1),
        ("http://127.0.0.1:4200/api", "tcp://10.0.0.5:8786", None),
        ("http://prefect.example/api", None, None),
        ("https://127.0.0.1:4200/api", None, None),
    ],
)
def test_engine_gives_prefects_clients_one_certificate_where_nobody_looks_at_it(
    server: str, address: str | None, certificates: int | None
) -> None:
    sweep = SweepSettings(engine="dask", address=address)
    before = PREFECT_API_SSL_CERT_FILE.value()
    with temporary_settings({PREFECT_API_URL: server}), engines._clients(sweep):
        file = PREFECT_API_SSL_CERT_FILE.value()
    if certificates is None:
        assert file == before
    else:
        assert ssl.create_default_context(cafile=file).cert_store_stats()["x509"] == certificates


def test_engine_that_is_not_there_is_one_error(engine: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    sweep = SweepSettings(engine=engine, address=address)  # type: ignore[arg-type]
    words = f"sweep.address: expected a cluster that listens at {address}: .*refused; start it"
    with pytest.raises(PipelineError, match=words):
        engines.run("a sweep", sweep, Completed)
