"""A sweep on a Prefect work pool: a real server, real workers, and what they leave when killed."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed

from pipelines import prefect_session
from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.sweep import engines
from pipelines.sweep import pool as pool_of_sweep
from pipelines.sweep.looks import OnLook
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.trial_flow import ptv2_trial
from pipelines.sweep.trials import SweepStudy
from tests.pipelines import postgres
from tests.pipelines.chain_parts import ROOT
from tests.pipelines.processes import Running, environment, is_running, processes, program, run
from tests.pipelines.sweep_engine import open_sweep, run_sweep

pytest.importorskip("grpc", reason="needs `pip install 'ptv2[dask]'`")

pytestmark = pytest.mark.slow
TRIALS = 3
HOST_COMMAND = "pipelines.sweep.host"
CHANGES: dict[str, Any] = {"n_trials": TRIALS, "workers": 1, "finalists": 1, "seeds": 1}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A workspace whose deployments are on a server."""

    root: Path
    url: str
    home: Path

    def prefect(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.url, "PREFECT_HOME": str(self.home)}

    @contextmanager
    def worker(self) -> Iterator[Running]:
        started = Running(
            self.root,
            program("prefect"), "worker", "start", "--pool", "ptv2", "--type", "process",
            environment={
                **environment(),
                **self.prefect(),
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
            },
        )  # fmt: skip
        try:
            yield started
        finally:
            started.kill_all()


@pytest.fixture(scope="module")
def by_threads(
    sweepable: Path, warm_hosts: None, tmp_path_factory: pytest.TempPathFactory
) -> SweepRecord:
    root = shutil.copytree(sweepable, tmp_path_factory.mktemp("threads") / "space")
    return run_sweep(root, **CHANGES)


def deploy(workspace: Path, root: Path, prefect: dict[str, str]) -> Path:
    """Deploy the trial from a copy of a workspace with the project's code, as from a clone.

    Args:
        workspace: That is prepared.
        root: Where the copy is made.
        prefect: Variables that say where Prefect is.
    """
    shutil.copytree(workspace, root)
    shutil.copy(ROOT / "prefect.yaml", root)
    for name in ("pipelines", "ptv2_core"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ("env", *(f"{name}={value}" for name, value in prefect.items()), program("prefect"))
    run(root, *command, "work-pool", "create", "ptv2", "--type", "process")
    run(root, *command, "--no-prompt", "deploy", "--name", "trial")
    return root


@pytest.fixture(scope="module")
def deployed(sweepable: Path, prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose trial is deployed."""
    folder = tmp_path_factory.mktemp("deployed")
    prefect = {"PREFECT_API_URL": prefect_url, "PREFECT_HOME": str(folder / "home")}
    return deploy(sweepable, folder / "space", prefect)


@pytest.fixture
def pool(deployed: Path, prefect_url: str, tmp_path: Path) -> Pool:
    root = shutil.copytree(deployed, tmp_path / "space")
    return Pool(root=root, url=prefect_url, home=tmp_path / "home")


@pytest.fixture(autouse=True)
def _server(prefect_url: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


def sweep_on_pool(
    root: Path, name: str, on_look: OnLook = lambda look: None, **changes: Any
) -> SweepRecord:
    """Sweep as the flow does, in a flow run of this name."""
    settings = {**CHANGES, "engine": "work_pool", **changes}
    found: list[SweepRecord] = []
    raised: list[PipelineError] = []

    def work() -> State[Any]:
        with open_sweep(root, **settings) as sweep, engines.submitting(sweep.sweep) as submit:
            try:
                found.append(sweep.run(submit, on_look))
            except PipelineError as error:
                raised.append(error)
        return Completed(message="done")

    with prefect_session.session(root):
        engines.run(name, SweepSettings.model_validate(settings), work).result()
    if raised:
        raise raised[0]
    return found[0]


def runs_of(name: str) -> list[FlowRun]:
    """Return the flow runs under a flow run, in the order of their start."""
    with get_client(sync_client=True) as client:
        parent = {"name": {"any_": [name]}}
        sweeps = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(parent))
        children = {"parent_flow_run_id": {"any_": [one.id for one in sweeps]}}
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(children))
    return sorted(found, key=lambda one: str(one.created))


def what_was_found(record: SweepRecord) -> list[Any]:
    trials = [(one.number, one.params, one.epochs, one.state, one.origin) for one in record.trials]
    return [*trials, *record.finalists]


def test_pool_finds_what_threads_find_in_flow_runs_under_that_of_the_sweep(
    pool: Pool, by_threads: SweepRecord
) -> None:
    with pool.worker():
        record = sweep_on_pool(pool.root, "on a pool")
    assert what_was_found(record) == what_was_found(by_threads)
    runs = runs_of("on a pool")
    assert [one.name.partition(":")[0] for one in runs] == ["trial 0", "trial 1", "trial 2"]
    states = [one.state.name for one in runs if one.state is not None]
    assert states == [one.state.capitalize() for one in record.trials]


def processes_of(pool: Pool, part: str) -> list[int]:
    return [pid for pid, command in processes(pool.root).items() if part in command]


@pytest.mark.long
@pytest.mark.skipif(not postgres.is_possible(), reason="needs PostgreSQL's programs")
def test_pool_trains_on_postgresql_whose_password_prefect_never_gets(
    pool: Pool, by_threads: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres.server() as database:
        monkeypatch.setenv("PTV2_STORAGE", database.new_database())
        with pool.worker() as worker:
            record = sweep_on_pool(pool.root, "on PostgreSQL", n_trials=1)
            said = worker.said
    assert record.trials[0].epochs == by_threads.trials[0].epochs
    (trial,) = runs_of("on PostgreSQL")
    kept = trial.model_dump_json()
    assert "postgresql+psycopg2://ptv2@127.0.0.1" in kept
    assert postgres.PASSWORD not in kept + said


def flow_run_process(host: int) -> int:
    """Return the process that supervises a host."""
    status = Path(f"/proc/{host}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


@pytest.mark.parametrize(
    ("what", "says"),
    [("machine", "silent for"), pytest.param("process", "-9", marks=pytest.mark.long)],
)
def test_pool_trains_a_trial_again_whose_worker_is_killed(
    what: str, says: str, pool: Pool, by_threads: SweepRecord
) -> None:
    killed: list[int] = []

    def kill(worker: Running, workers: ExitStack) -> None:
        while not (found := processes_of(pool, HOST_COMMAND)):
            time.sleep(0.05)
        while not list((pool.root / ".ptv2" / "sweeps").rglob("trial-0.safetensors")):
            time.sleep(0.002)
        (host,) = found
        os.kill(host, signal.SIGSTOP)  # it would have trained to its end meanwhile
        killed.extend((host, flow_run_process(host)))
        if what == "machine":
            worker.kill()
        for pid in reversed(killed):
            os.kill(pid, signal.SIGKILL)
        if what == "machine":
            workers.enter_context(pool.worker())

    with ExitStack() as workers:
        worker = workers.enter_context(pool.worker())
        killer = threading.Thread(target=kill, args=(worker, workers))
        killer.start()
        record = sweep_on_pool(pool.root, f"a killed {what}", n_trials=1, heartbeat_s=8)
        killer.join()
        assert not any(map(is_running, killed))
    (trial,) = record.trials
    assert (trial.number, trial.state, trial.retries) == (0, "complete", 1)
    assert trial.epochs == by_threads.trials[0].epochs
    first, second = (one.state for one in runs_of(f"a killed {what}"))
    assert first is not None
    assert second is not None
    assert (first.name, second.name) == ("Crashed", "Complete")
    assert says in str(first.message)


def test_pool_cancels_what_it_gave_away_when_the_sweep_is_interrupted(pool: Pool) -> None:
    def interrupt() -> None:
        while not processes_of(pool, HOST_COMMAND):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with pool.worker():
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            sweep_on_pool(pool.root, "interrupted", n_trials=1)
        deadline = time.monotonic() + 30
        while processes_of(pool, HOST_COMMAND) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes_of(pool, HOST_COMMAND)
    (left,) = runs_of("interrupted")
    assert left.state is not None
    assert left.state.is_cancelled()


def test_pool_ends_the_sweep_with_what_a_worker_lacks(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sweep.pool.check", lambda sweep: None)

    def refuse() -> None:
        while not (runs := runs_of("refused")):
            time.sleep(0.1)
        with get_client(sync_client=True) as client:
            state: State[Any] = Failed(
                name="Refused", message="expected the workspace of the sweep"
            )
            client.set_flow_run_state(runs[0].id, state, force=True)

    threading.Thread(target=copy_context().run, args=(refuse,)).start()
    with pytest.raises(PipelineError, match="a worker refused it: expected the workspace"):
        sweep_on_pool(pool.root, "refused")


def test_pool_flow_refuses_an_order_that_it_cannot_train() -> None:
    state: State[Any] = ptv2_trial({"study": "a-study"}, 0, "a-token", return_state=True)
    assert (state.name, state.is_failed()) == ("Refused", True)
    assert "expected an order of this version of ptv2" in str(state.message)


def test_pool_without_a_worker_is_one_error(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sweep.pool.COMING_S", 0.0)
    monkeypatch.setattr("pipelines.sweep.pool._online", lambda client, pool: 0)
    words = "none of the pool ptv2 is online; start one in the workspace: prefect worker start"
    with pytest.raises(PipelineError, match=words):
        sweep_on_pool(pool.root, "no worker")
    assert not (pool.root / ".ptv2" / "sweeps.db").exists()


@pytest.mark.parametrize(
    ("online", "limit", "words"),
    [(0, "NO_WORKER_S", "no worker of the pool ptv2 is online, for"), (1, "UNTAKEN_S", "paused")],
)
def test_pool_that_takes_nothing_ends_the_sweep_with_its_trial_kept(
    online: int, limit: str, words: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sweep.pool.check", lambda sweep: None)
    monkeypatch.setattr("pipelines.sweep.pool._online", lambda client, pool: online)
    monkeypatch.setattr("pipelines.sweep.pool.NO_WORKER_S", 1.0)
    monkeypatch.setattr(f"pipelines.sweep.pool.{limit}", 1.0)
    name = f"nothing is taken, {online} online"
    with pytest.raises(PipelineError, match=f"{words}.*no finished trial is lost"):
        sweep_on_pool(pool.root, name, retries=0)
    (left,) = runs_of(name)
    assert left.state is not None
    assert left.state.is_cancelled(), "no worker that comes later begins it"
    with open_sweep(pool.root, **CHANGES) as sweep:
        asked = sweep.study.ask(TRIALS)
        assert asked is not None
        assert (asked.number, asked.is_taken_over) == (0, True)
        assert sweep.study.retries(0) == 0


def test_pool_cancels_the_others_where_a_run_was_deleted(deployed: Path) -> None:
    left = pool_of_sweep._Pool(pool_of_sweep.DEPLOYMENT)
    left._study = cast(SweepStudy, SimpleNamespace(noted=dict))
    with get_client(sync_client=True) as client:
        trial = client.read_deployment_by_name(pool_of_sweep.DEPLOYMENT).id
        empty = {"order": {}, "place": 0, "token": ""}
        for number in range(3):
            run = client.create_flow_run_from_deployment(trial, parameters=empty)
            left._given[str(number)] = pool_of_sweep._Given(
                number=number, place=number, token="", heartbeat_s=1.0, done=dict, run=run.id
            )
        client.delete_flow_run(left._given["0"].run)
        left.cancel()
        runs = [client.read_flow_run(left._given[number].run) for number in "12"]
    assert [one.state is not None and one.state.is_cancelled() for one in runs] == [True, True]


def test_pool_refuses_an_address_that_is_no_deployment() -> None:
    for address, words in (
        ("10.0.0.5:8786", "expected null or a deployment as FLOW/NAME, got 10.0.0.5:8786"),
        ("ptv2-trial/gpu", "needs the deployment ptv2-trial/gpu, which is not at http://"),
    ):
        sweep = SweepSettings(engine="work_pool", address=address)
        with pytest.raises(PipelineError, match=words):
            engines.run("a sweep", sweep, Completed)
