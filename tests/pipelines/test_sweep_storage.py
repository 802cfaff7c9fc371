"""Sweeps end with exactly their trials on each database, whatever happens to it on the way."""

import os
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import PipelineError
from pipelines.sweep import proxy, training
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.training import Order
from pipelines.sweep.trials import open_storage
from pipelines.sweep.urls import shown, with_driver
from tests.pipelines.postgres import PASSWORD, Postgres
from tests.pipelines.processes import processes
from tests.pipelines.sweep_engine import after, open_sweep, run_sweep
from tests.stage_parts import change_params

pytestmark = pytest.mark.slow
N = 3


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A workspace whose sweep is finished, and the settings of `sweep` that say where."""

    root: Path
    storage: dict[str, Any]
    record: SweepRecord


def settings_of(kind: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return settings of `sweep` that choose a database, which is empty."""
    if kind == "sqlite":
        return {}
    if kind == "proxy":
        pytest.importorskip("grpc", reason="needs `pip install 'ptv2[dask]'`")
        return {"engine": "dask"}  # which decides where the database is; what trains are threads
    postgres: Postgres = request.getfixturevalue("postgres")
    return {"storage": postgres.new_database()}


@pytest.fixture(scope="module")
def prepared_workspace(
    sweepable: Path, warm_hosts: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = shutil.copytree(sweepable, tmp_path_factory.mktemp("sweep") / "space")
    change_params(root, {"sweep.n_trials": N, "sweep.finalists": 1})
    return root


@pytest.fixture
def root(prepared_workspace: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared_workspace, tmp_path / "space")


@pytest.fixture(scope="module")
def finish(
    prepared_workspace: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Finished]:
    """Return what sweeps on a database, once for each; it is to be copied."""

    @cache
    def finished(kind: str) -> Finished:
        root = shutil.copytree(prepared_workspace, tmp_path_factory.mktemp(kind) / "space")
        storage = settings_of(kind, request)
        return Finished(root=root, storage=storage, record=run_sweep(root, workers=1, **storage))

    return finished


@pytest.fixture(scope="module")
def whole(finish: Callable[[str], Finished]) -> SweepRecord:
    """What a sweep on SQLite finds that nothing happens to."""
    return finish("sqlite").record


@pytest.fixture(params=["sqlite", "proxy", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def storage(kind: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    return settings_of(kind, request)


def trials_of(record: SweepRecord) -> list[tuple[Any, ...]]:
    return [
        (one.number, one.params, one.epochs, one.state, one.value, one.origin)
        for one in record.trials
    ]


def check_is(record: SweepRecord, whole: SweepRecord) -> None:
    assert trials_of(record) == trials_of(whole)
    assert record.finalists == whole.finalists


def refuse(order: Order) -> None:
    raise AssertionError("nothing is left to train")


def test_sweep_counts_on_each_database_and_trains_nothing_twice(
    kind: str, finish: Callable[[str], Finished], whole: SweepRecord
) -> None:
    finished = finish(kind)
    check_is(finished.record, whole)
    check_is(run_sweep(finished.root, train=refuse, **finished.storage), whole)


def test_sweep_with_two_workers_counts_on_each_database(
    root: Path, storage: dict[str, Any]
) -> None:
    record = run_sweep(root, workers=2, n_trials=5, **storage)
    assert [one.number for one in record.trials] == list(range(5))
    assert all(one.state in ("complete", "pruned") for one in record.trials)


def test_sweep_takes_over_what_a_dead_one_left_and_can_be_made_longer(
    root: Path, storage: dict[str, Any], whole: SweepRecord
) -> None:
    with open_sweep(root, **storage) as dead:
        left = dead.study.ask(N)  # it began one and died
    assert left is not None
    assert [one.number for one in run_sweep(root, workers=1, n_trials=2, **storage).trials] == [
        0,
        1,
    ]
    longer = run_sweep(root, workers=1, **storage)
    assert trials_of(longer) == trials_of(whole)


def test_sweep_tries_what_was_best_before(
    kind: str, finish: Callable[[str], Finished], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    finished = finish(kind)
    root, storage = shutil.copytree(finished.root, tmp_path / "space"), finished.storage
    if "storage" in storage:
        postgres: Postgres = request.getfixturevalue("postgres")
        storage = {"storage": postgres.new_database(like=storage["storage"])}
    change_params(root, {"train.batch_size": 8})  # another study
    with open_sweep(root, transfer=3, **storage) as sweep:
        asked = [sweep.study.ask(N) for _ in range(N)]
        origins = [one.origin for one in sweep.study.running()]
    assert origins[:2] == ["baseline", "transferred"]
    best = sorted(finished.record.trials, key=lambda one: -(one.value or 0.0))
    tried = [one.params for one in asked if one]
    assert all(one.params in tried for one in best[: origins.count("transferred")])


def test_sweep_is_refused_where_another_works_on_it(
    root: Path, storage: dict[str, Any], tmp_path: Path
) -> None:
    """On this machine by a file; on another one, which has a file of its own, by the server."""
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    with open_sweep(root, **storage):
        with pytest.raises(PipelineError, match="another sweep of this task"):
            run_sweep(root, **storage)
        if "storage" in storage:
            with pytest.raises(PipelineError, match="another machine works on intents-"):
                run_sweep(elsewhere, **storage)
    if "storage" in storage:
        with open_sweep(elsewhere, **storage) as free:
            assert free.study.ask(N) is not None


def lose(storage: dict[str, Any], root: Path, postgres: Callable[[], Postgres]) -> None:
    """Take a database away for a while."""
    if "storage" in storage:
        postgres().control("restart", "-m", "immediate")
    elif "engine" in storage:
        (pid,) = writers(root)
        os.kill(pid, signal.SIGKILL)
    else:
        with sqlite3.connect(root / ".ptv2" / "sweeps.db", timeout=60) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(2)


def writers(root: Path) -> list[int]:
    """Return the processes that write a workspace's database for others."""
    found = processes(root).items()
    return [
        pid
        for pid, command in found
        if "pipelines.sweep.proxy" in command and "guarded.py" not in command
    ]


def test_sweep_loses_nothing_when_its_database_is_away(
    root: Path,
    storage: dict[str, Any],
    whole: SweepRecord,
    request: pytest.FixtureRequest,
) -> None:
    done: list[float] = []

    def act(order: Order) -> None:
        lose(storage, root, lambda: request.getfixturevalue("postgres"))
        done.append(time.monotonic())

    check_is(run_sweep(root, train=after(2, act), workers=1, **storage), whole)
    assert done, "it was back before the sweep ended"


def test_sweep_goes_on_while_another_machine_has_its_study_no_longer(
    root: Path, postgres: Postgres, tmp_path: Path
) -> None:
    """A server that was restarted has forgotten who holds what: the first to ask holds it."""
    url = postgres.new_database()
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    with open_sweep(root, storage=url) as sweep:
        assert sweep.study.ask(N) is not None
        postgres.control("restart", "-m", "immediate")
        with (
            open_sweep(elsewhere, storage=url),
            pytest.raises(PipelineError, match="another machine works on intents-"),
        ):
            sweep.study.ask(N)
        assert sweep.study.ask(N) is not None


@pytest.mark.parametrize("place", ["password", "query"])
def test_storage_never_shows_a_password(place: str, root: Path, postgres: Postgres) -> None:
    wrong = "wr0ng-word"
    url = postgres.url(password=wrong)
    if place == "query":
        url = url.replace(f":{wrong}@", "@") + f"?password={wrong}"
    with pytest.raises(PipelineError, match="sweep.storage: postgresql.*password auth") as error:
        run_sweep(root, storage=url)
    assert wrong not in str(error.value)
    right = postgres.new_database()
    with open_sweep(root, storage=right) as sweep:
        asked = sweep.study.ask(N)
        assert asked is not None
        order = sweep.order(asked)
    assert PASSWORD in order.url
    assert PASSWORD not in repr(order)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "postgresql://me:s3cret@127.0.0.1:9/none",
            "postgresql.*//me:\\*\\*\\*@127.0.0.1:9/none: .*refused",
        ),
        ("nonsense:s3cret", "nonsense:...: "),
        ("grpc://nowhere", "expected grpc://HOST:PORT, got grpc://nowhere"),
    ],
)
def test_storage_that_cannot_be_opened_is_one_error(url: str, words: str) -> None:
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg2", reason="needs `pip install 'ptv2[postgres]'`")
    with pytest.raises(PipelineError, match=f"sweep.storage: {words}") as error:
        open_storage(with_driver(url))
    assert "s3cret" not in str(error.value)
    assert "s3cret" not in shown(url)


def test_proxy_that_does_not_start_is_one_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(PipelineError, match="Optuna's gRPC proxy ended; .*log says:"),
        proxy.one_writer("sqlite:////dev/null/no.db", towards=None, log=log),
    ):
        pass


def test_proxy_listens_where_the_cluster_is() -> None:
    assert proxy.listening_address(None) == "127.0.0.1"
    assert proxy.listening_address("localhost") == "127.0.0.1"


def test_proxy_ends_with_its_sweep(root: Path) -> None:
    pytest.importorskip("grpc", reason="needs `pip install 'ptv2[dask]'`")
    with open_sweep(root, engine="dask") as sweep:
        port = int(sweep.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_worker_that_outlives_the_sweep_ends_what_is_idle(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "IDLE_S", 0.5)
    with open_sweep(root) as sweep:
        asked = sweep.study.ask(N)
        assert asked is not None
        assert training.train(sweep.order(asked)).state == "complete"
        (host,) = training.supervisor(sweep.study.name)._idle
        deadline = time.monotonic() + 20
        while host.is_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not host.is_alive
        again = sweep.study.ask(N)
        assert again is not None
        assert training.train(sweep.order(again)).state in ("complete", "pruned")
