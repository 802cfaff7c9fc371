"""A sweep under a real Prefect server: what its pages show, and what it leaves."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.client.schemas.sorting import LogSort, TaskRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.settings import load_settings
from pipelines.sweep import flow
from pipelines.sweep.looks import Look
from pipelines.sweep.record import SweepRecord, in_words
from ptv2_core.errors import ConfigError
from tests.pipelines.chain_parts import make_repository
from tests.pipelines.sweep_engine import SWEEP
from tests.stage_parts import PARAMS, call, change_params, read_params, write_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository with one task, as the current folder."""
    tasks = {"intents": PARAMS["tasks"]["intents"]}
    made = make_repository(tmp_path_factory.mktemp("flow") / "space", tasks)
    change_params(made, {"search.epochs": 2, "sweep": {**SWEEP, "n_trials": 4}})
    before = Path.cwd()
    os.chdir(made)
    yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def swept(root: Path, prefect_url: str) -> SweepRecord:
    """The record of a sweep of a task whose data was not prepared yet."""
    looks: list[Look] = []
    settings = load_settings(root / "params.yaml")
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        found, failed = flow.run(
            settings, ["intents"], trials=None, workers=None, on_look=looks.append
        )
    assert failed is None
    (record,) = found
    assert looks
    assert looks[0].asked == 4
    return record


def read_runs(url: str, name: str) -> list[Any]:
    """Return the final task runs of a flow run by its name."""
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        by_name = FlowRunFilter.model_validate({"name": {"any_": [name]}})
        deadline = time.monotonic() + 20
        while True:
            runs = client.read_task_runs(
                flow_run_filter=by_name, sort=TaskRunSort.NAME_ASC, limit=100
            )
            final = [one for one in runs if one.state is not None and one.state.is_final()]
            if len(final) >= 6 or time.monotonic() > deadline:
                return final
            time.sleep(0.2)


def read_logs(url: str, run: UUID, count: int) -> list[str]:
    """Return the lines of a task run's log that are about epochs, once there are so many."""
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        only = LogFilter.model_validate({"task_run_id": {"any_": [run]}})
        deadline = time.monotonic() + 20
        while True:
            logs = client.read_logs(log_filter=only, sort=LogSort.TIMESTAMP_ASC)
            lines = [one.message for one in logs if one.message.startswith("epoch ")]
            if len(lines) >= count or time.monotonic() > deadline:
                return lines
            time.sleep(0.2)


def test_flow_has_a_task_run_for_each_trial_and_each_seed_of_a_finalist(
    swept: SweepRecord, prefect_url: str
) -> None:
    runs = {one.name: one.state.name for one in read_runs(prefect_url, swept.flow_run)}
    trials = {name: state for name, state in runs.items() if name.startswith("trial ")}
    assert len(trials) == 4
    states = [one.state.capitalize() for one in swept.trials]
    assert [trials[name] for name in sorted(trials)] == states
    assert "trial 0: prompt_length 4, learning_rate 0.01" in trials
    seeds = {f"finalist {one.number}, seed 43" for one in swept.finalists}
    assert set(runs) - set(trials) == seeds


def test_flow_shows_the_scores_of_each_epoch_and_the_best_one(
    swept: SweepRecord, prefect_url: str
) -> None:
    found = {one.name: one for one in read_runs(prefect_url, swept.flow_run)}
    for one in swept.trials:
        run = found[f"trial {one.number}: {in_words(one.params)}"]
        assert run.state.message.startswith(f"{one.state}, best on dev {one.value:.4f}, in ")
        lines = [f"epoch {epoch}: dev {score:.4f}" for epoch, score in enumerate(one.epochs, 1)]
        assert read_logs(prefect_url, run.id, len(lines)) == lines
    # the trial's own seed is first
    finalist = swept.finalists[0]
    message = found[f"finalist {finalist.number}, seed 43"].state.message
    assert message.startswith(f"complete, best on dev {finalist.scores[1]:.4f}, in ")


def test_flow_leaves_the_record_the_page_and_an_artifact(
    swept: SweepRecord, root: Path, prefect_url: str
) -> None:
    assert SweepRecord.read(TaskPaths(root=root, task="intents")) == swept
    folder = root / "results" / "sweeps" / "intents"
    assert (folder / "study.html").stat().st_size > 1000
    assert list(folder.glob("*.png"))
    artifact = httpx.get(f"{prefect_url}/artifacts/ptv2-sweep-intents/latest").json()
    assert artifact["type"] == "markdown"
    assert f"{swept.winner.number}" in artifact["data"]


def test_flow_logs_a_run_for_the_sweep_and_a_child_for_each_trial(
    swept: SweepRecord, root: Path
) -> None:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ptv2")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("ptv2.kind") == "sweep"]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 4
    assert parent.data.tags["ptv2.study"] == swept.study


def test_flow_sweeps_the_next_task_where_one_cannot_be(
    swept: SweepRecord, root: Path, prefect_url: str
) -> None:
    before = read_params(root)
    broken = {**PARAMS["tasks"]["intents"], "fetch": {"source": "local", "path": "mine/nothing"}}
    write_params(root, {**before, "tasks": {"broken": broken, **before["tasks"]}})
    try:
        settings = load_settings(root / "params.yaml")
        with temporary_settings({PREFECT_API_URL: prefect_url}):
            records, failed = flow.run(
                settings,
                ["broken", "intents"],
                trials=None,
                workers=None,
                on_look=lambda look: None,
            )
    finally:
        write_params(root, before)
    assert [(one.task, one.winner) for one in records] == [("intents", swept.winner)]
    assert str(failed).startswith("broken: ")
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        named = FlowRunFilter.model_validate({"name": {"any_": ["sweeps: broken, intents"]}})
        (run,) = client.read_flow_runs(flow_run_filter=named)
    assert run.state is not None
    assert run.state.is_failed()
    assert "broken: " in run.state.message
    assert f"by trial {swept.winner.number}" in run.state.message


@pytest.mark.parametrize("gone", ["create_markdown_artifact", "ptv2_sweep"])
def test_flow_says_what_to_do_where_the_server_is_gone(
    gone: str, swept: SweepRecord, root: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a sweep, and where nothing can be said to it any more."""

    def refused(*given: Any, **options: Any) -> None:
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(flow, gone, refused)
    settings = load_settings(root / "params.yaml")
    expected = (
        r"Prefect's server at http.* does not answer \(Connection refused\); no finished trial"
    )
    with (
        temporary_settings({PREFECT_API_URL: prefect_url}),
        pytest.raises(PipelineError, match=expected),
    ):
        flow.run(settings, ["intents"], trials=None, workers=None, on_look=lambda look: None)
    again = SweepRecord.read(TaskPaths(root=root, task="intents"))
    assert [one.epochs for one in again.trials] == [one.epochs for one in swept.trials]


def test_commands_take_a_workspace_that_is_elsewhere(
    swept: SweepRecord,
    root: Path,
    prefect_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The backbone's folder, `./backbone`, is relative to the workspace."""
    monkeypatch.chdir(tmp_path)
    space = os.path.relpath(root)
    page = f"page      {space}/results/sweeps/intents/study.html ("
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        assert call("sweep", "-t", "intents", "-C", space) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert page in said
    assert f"ptv2 apply intents -C {space}" in said
    monkeypatch.chdir(tmp_path)
    assert call("study", "intents", "-C", space, "--png", "plots", "--json", "all.json") == 0
    said = capsys.readouterr().out
    assert page in said
    assert f"plots     {tmp_path}/plots: " in said
    assert {path.name for path in tmp_path.iterdir()} >= {"plots", "all.json"}
    assert call("apply", "intents", "-C", space, "--dry-run") == 0
    assert f"{space}/params.yaml" in capsys.readouterr().out


def test_flow_of_a_deployment_sweeps_a_workspace_that_is_elsewhere(
    swept: SweepRecord,
    root: Path,
    prefect_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        state = flow.ptv2_sweep(str(root), ["intents"], return_state=True)
    assert state.is_completed(), state.message
    assert f"by trial {swept.winner.number}" in state.message
    assert Path.cwd() == tmp_path


def test_flow_again_trains_nothing_and_its_winner_can_be_applied(
    swept: SweepRecord, root: Path, prefect_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_url)
        with temporary_settings({PREFECT_API_URL: prefect_url}):
            assert call("sweep", "-t", "intents") == 0
    said = capsys.readouterr().out
    assert "swept intents: " in said
    assert "ptv2 apply intents" in said
    again = json.loads((root / "results" / "sweeps" / "intents" / "sweep.json").read_text())
    assert len(again["trials"]) == 4
    assert call("apply", "intents") == 0
    chosen = load_settings(root / "params.yaml").task("intents").train
    assert chosen.learning_rate == swept.winner.params["learning_rate"]
    assert chosen.prompt.length == swept.winner.params["prompt_length"]


def test_flow_refuses_a_task_that_is_not_there(root: Path, prefect_url: str) -> None:
    settings = load_settings(root / "params.yaml")
    with (
        temporary_settings({PREFECT_API_URL: prefect_url}),
        pytest.raises(ConfigError, match="expected a task of"),
    ):
        flow.run(settings, ["intent"], trials=1, workers=1, on_look=lambda look: None)
