"""A sweep under a real Prefect server: what its pages show, and what it leaves."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import TaskRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines.paths import TaskPaths
from pipelines.settings import load_settings
from pipelines.sweep import flow
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.sweeping import Look
from ptv2_core.errors import ConfigError
from tests.pipelines.chain_parts import make_repository
from tests.pipelines.sweep_engine import SWEEP
from tests.stage_parts import PARAMS, call, change_params

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
        (record,) = flow.run(settings, ["intents"], trials=None, workers=None, on_look=looks.append)
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
