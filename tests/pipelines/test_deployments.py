"""prefect.yaml on a real server: deployed from a clone, run by a real worker from a schedule."""

import importlib
import inspect
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines import flows, prefect_session
from pipelines.paths import TaskPaths
from pipelines.prefect_server import temporary_server
from pipelines.sweep import pool
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.trial_flow import ptv2_trial
from tests.pipelines.chain_parts import ROOT, make_repository, registered, versions
from tests.pipelines.conftest import Workspace
from tests.pipelines.processes import PATIENCE_S, Running, environment, program, run
from tests.stage_parts import PARAMS

SCHEDULED = ("run-nightly", "sweep-weekly", "watch")
DEPLOYMENTS = (*SCHEDULED, "trial")
SCHEDULED_IN_S = 6
"""The server looks every second for what is due, and a worker too."""


def declared(file: Path = ROOT / "prefect.yaml") -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def deployment(name: str) -> dict[str, Any]:
    found = {entry["name"]: entry for entry in declared()["deployments"]}
    assert tuple(found) == DEPLOYMENTS
    chosen: dict[str, Any] = found[name]
    return chosen


@pytest.mark.parametrize("name", SCHEDULED)
def test_deployments_name_a_flow_and_parameters_that_exist(name: str) -> None:
    entry = deployment(name)
    path, _, function = entry["entrypoint"].partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    flow = getattr(module, function)
    assert set(entry["parameters"]) == set(inspect.signature(flow.fn).parameters)
    flow.validate_parameters(entry["parameters"])


@pytest.mark.parametrize("name", SCHEDULED)
def test_deployments_run_one_at_a_time_where_their_worker_was_started(name: str) -> None:
    entry = deployment(name)
    assert entry["concurrency_limit"]["limit"] == 1
    assert entry["parameters"]["root"] == "."
    assert entry["work_pool"]["name"] == "ptv2"
    assert entry["work_pool"]["job_variables"]["working_dir"] == "."
    (schedule,) = entry["schedules"]
    if "cron" in schedule:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    else:
        assert schedule["interval"] >= 60


def test_deployments_trial_is_run_by_sweeps_alone() -> None:
    entry = deployment("trial")
    assert entry["entrypoint"] == "pipelines/sweep/trial_flow.py:ptv2_trial"
    assert f"{ptv2_trial.name}/trial" == pool.DEPLOYMENT
    assert set(inspect.signature(ptv2_trial.fn).parameters) == {"order", "place", "token"}
    assert (entry["parameters"], entry["schedules"]) == ({}, [])
    assert "concurrency_limit" not in entry
    assert entry["work_pool"] == deployment("sweep-weekly")["work_pool"]


def test_deployments_watch_gives_its_runs_to_the_nightly_one() -> None:
    nightly = deployment("run-nightly")
    assert deployment("watch")["parameters"]["deployment"] == f"{flows.ptv2_run.name}/run-nightly"
    # cancelled, a run for changed data would be lost
    assert nightly["concurrency_limit"]["collision_strategy"] == "ENQUEUE"


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A repository whose deployments are on a server, with a worker.

    Attributes:
        root: The repository.
        due: When the nightly run was.
    """

    root: Path
    due: datetime


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the API URL of a server that heeds schedules."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RECENT_DEPLOYMENTS_LOOP_SECONDS", "LOOP_SECONDS"):
            patch.setenv(f"PREFECT_SERVER_SERVICES_SCHEDULER_{name}", "1")
        with temporary_server(tmp_path_factory.mktemp("deployments"), schedules=True) as url:
            yield url


def schedule_soon(name: str) -> datetime:
    """Move the schedule that a deployment was deployed with; returns when it is first due."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(name)
        (declared_one,) = found.schedules
        due = datetime.now(UTC) + timedelta(seconds=SCHEDULED_IN_S)
        daily = IntervalSchedule(interval=timedelta(days=1), anchor_date=due)
        client.update_deployment_schedule(found.id, declared_one.id, schedule=daily)
    return due


@pytest.fixture(scope="module")
def deployed(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Deploy from a clone, start a worker, and have the nightly run due in some seconds."""
    folder = tmp_path_factory.mktemp("clone")
    tasks = {"intents": {**PARAMS["tasks"]["intents"], "search": {"n_trials": 0}}}
    sweep = {"engine": "work_pool", "n_trials": 2, "workers": 1, "finalists": 1, "seeds": 1}
    root = make_repository(folder / "repository", tasks, sweep=sweep)
    shutil.copy(ROOT / "prefect.yaml", root)
    prefect = {"PREFECT_API_URL": server, "PREFECT_HOME": str(folder / "home")}
    command = ("env", *(f"{name}={value}" for name, value in prefect.items()), program("prefect"))
    run(root, *command, "work-pool", "create", "ptv2", "--type", "process")
    # it comes up while the deployments are made
    worker = Running(
        root,
        program("prefect"), "worker", "start", "--pool", "ptv2", "--type", "process",
        environment={**environment(), **prefect, "PREFECT_WORKER_QUERY_SECONDS": "1"},
    )  # fmt: skip
    content = declared()
    content["deployments"][2]["schedules"] = []  # that of `watch` would be due at once
    (root / "prefect.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with temporary_settings({PREFECT_API_URL: server}):
        try:
            # PWD as a script has it that only changed the folder of its child
            run(root, *command, "--no-prompt", "deploy", "--all", PWD="/")
            yield Deployed(root=root, due=schedule_soon("ptv2-run/run-nightly"))
        finally:
            with suppress(ProcessLookupError):
                worker.kill_all()


def finished_run_of(name: str, *, after: datetime) -> FlowRun:
    """Return the first run of a deployment that was due since some time, once it is final."""
    deadline = time.monotonic() + PATIENCE_S
    only = FlowRunFilter.model_validate(
        {"expected_start_time": {"after_": after - timedelta(seconds=1)}}
    )
    seen: list[Any] = []
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            wanted = client.read_deployment_by_name(name).id
            found = client.read_flow_runs(flow_run_filter=only, limit=100)
        seen = [one for one in found if one.deployment_id == wanted]
        for one in seen:
            if one.state is not None and one.state.is_final():
                return one
        time.sleep(0.5)
    raise AssertionError([(one.name, one.state) for one in seen])


@pytest.mark.slow
def test_deployments_run_from_a_schedule_and_the_worker_finishes_it(deployed: Deployed) -> None:
    done = finished_run_of("ptv2-run/run-nightly", after=deployed.due)
    assert done.state is not None
    assert (done.state.type.value, done.state.message) == ("COMPLETED", "6 ran")
    assert done.auto_scheduled
    assert done.expected_start_time is not None
    assert abs(done.expected_start_time - deployed.due) < timedelta(seconds=1)
    assert done.parameters == {"root": ".", "tasks": None, "concurrency": 2, "retries": 3}
    assert versions(deployed.root) == [("intents", 1)]
    assert registered(deployed.root, "intents")["version"] == 1
    with get_client(sync_client=True) as client:
        names = {found.name for found in client.read_deployments()}
    assert names == set(DEPLOYMENTS)


@pytest.mark.long
def test_deployments_sweep_runs_from_a_schedule_and_its_trials_beside_it(
    deployed: Deployed,
) -> None:
    pytest.importorskip("grpc", reason="needs `pip install 'ptv2[dask]'`")
    finished_run_of("ptv2-run/run-nightly", after=deployed.due)
    due = schedule_soon("ptv2-sweep/sweep-weekly")
    done = finished_run_of("ptv2-sweep/sweep-weekly", after=due)
    record = SweepRecord.read(TaskPaths(root=deployed.root, task="intents"))
    assert done.state is not None
    words = f"intents: accuracy {record.finalists[0].mean:.4f} by trial {record.winner.number}"
    assert (done.state.type.value, done.state.message) == ("COMPLETED", words)
    assert done.auto_scheduled
    assert [one.number for one in record.trials] == [0, 1]
    with get_client(sync_client=True) as client:
        trial = client.read_deployment_by_name(pool.DEPLOYMENT).id
        found = [one for one in client.read_flow_runs() if one.deployment_id == trial]
    assert sorted(one.name.partition(":")[0] for one in found) == ["trial 0", "trial 1"]
    assert versions(deployed.root) == [("intents", 1)], "promotion is not a sweep's"


@pytest.mark.slow
def test_deployments_watch_starts_the_run_of_the_task_whose_source_changed(
    deployed: Deployed,
) -> None:
    finished_run_of("ptv2-run/run-nightly", after=deployed.due)
    file = deployed.root / "mine" / "intents" / "train.jsonl"
    file.write_text(file.read_text() + '{"text": \n')
    asked = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        watch = client.read_deployment_by_name("ptv2-watch/watch")
        client.create_flow_run_from_deployment(watch.id)
    looked = finished_run_of("ptv2-watch/watch", after=asked)
    assert looked.state is not None
    assert str(looked.state.message).startswith("changed: intents; started ")
    started = finished_run_of("ptv2-run/run-nightly", after=asked)
    assert started.parameters["tasks"] == ["intents"]
    assert started.state is not None
    assert started.state.is_failed()
    assert "not valid JSON" in str(started.state.message)


@pytest.mark.slow
def test_deployments_a_tag_limit_of_one_keeps_the_stages_of_a_gpu_apart(
    server: str, done: Workspace
) -> None:
    for task in ("a", "b"):
        done.set(task, "train", text="new", sleep=1)
    with temporary_settings({PREFECT_API_URL: server}):
        with get_client(sync_client=True) as client:
            client.create_concurrency_limit(tag=prefect_session.GPU_TAG, concurrency_limit=1)
        try:
            summary = flows.run(done.root, ["a", "b"], concurrency=2, retries=0)
        finally:
            with get_client(sync_client=True) as client:
                client.delete_concurrency_limit_by_tag(prefect_session.GPU_TAG)
    assert not summary.failed
    first, second = sorted([at for _, at in done.times(f"train@{task}")] for task in ("a", "b"))
    assert first[1] < second[0], "one had ended when the other began"
