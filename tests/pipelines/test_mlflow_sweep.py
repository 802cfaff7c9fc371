import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RegistryError
from pipelines.mlflow_sweep import log_sweep
from pipelines.sweep.record import Finalist, SweepRecord
from tests.pipelines.sweep_parts import finalist, sweep, trial
from tests.registry_parts import URI, empty_registry

ENDED = 1_767_323_045_000  # 2026-01-02T03:04:05Z
TRIALS = (
    trial(0, origin="baseline"),
    trial(1, state="pruned", epochs=(0.25,), value=0.25, seconds=2.0),
    trial(
        2,
        state="failed",
        epochs=(),
        value=None,
        seconds=0.5,
        message="the loss was not finite",
    ),
    trial(3, state="crashed", epochs=(0.5,), value=None, retries=2, origin="first"),
)
WON = Finalist(number=0, scores=(0.75, 0.625), mean=0.6875, spread=0.0884)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a workspace with an empty registry and the files of a sweep."""
    (tmp_path / "mlflow.db").write_bytes(empty_registry())
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "study.html").write_text("<p>study</p>")
    (folder / "history.png").write_bytes(b"png")
    (folder / ".half-written").write_text("no")
    return tmp_path


def log(root: Path, record: SweepRecord, **how: Any) -> str:
    record.write(root / "sweep")
    given = {"params": {"search.epochs": "2"}, "tracking_uri": URI, "experiment": "ptv2"} | how
    return log_sweep(record, root / "sweep", root=root, **given)


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def runs(root: Path, kind: str) -> list[Any]:
    """Return the runs of a kind, oldest first."""
    asked = client(root)
    experiment = asked.get_experiment_by_name("ptv2").experiment_id
    found = asked.search_runs([experiment], order_by=["attributes.start_time ASC"])
    return [run for run in found if run.data.tags["ptv2.kind"] == kind]


def rows(root: Path) -> dict[str, list[Any]]:
    """Return all that the registry's tables hold."""
    with sqlite3.connect(root / "mlflow.db") as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
        known = [name for name in tables if name in ("runs", "metrics", "params", "tags")]
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in known}


# What is in MLflow


def test_log_sweep_makes_one_run_that_sums_it_up(root: Path) -> None:
    record = sweep(*TRIALS, finalists=(WON,), stopped="no better trial in 16", asked=9)
    run_id = log(root, record)
    (run,) = runs(root, "sweep")
    assert run.info.run_id == run_id
    assert (run.info.run_name, run.info.status) == ("sweep of intents", "FINISHED")
    assert run.info.start_time == ENDED - 10_000
    assert run.data.params == {"search.epochs": "2"}
    assert run.data.metrics == {
        "best_dev_accuracy": 0.75,
        "winner_mean_accuracy": 0.6875,
        "winner_spread_accuracy": 0.0884,
        "trials": 4,
        "trials_complete": 1,
        "trials_pruned": 1,
        "trials_failed": 1,
        "trials_crashed": 1,
        "epochs_spent": 4,
    }
    tags = run.data.tags
    note = tags.pop("mlflow.note.content")
    assert tags.pop("ptv2.files").startswith("sha256:")
    assert tags.pop("mlflow.user", None) is None
    assert tags == {
        "mlflow.runName": "sweep of intents",
        "mlflow.source.name": "ptv2 sweep --task intents",
        "mlflow.source.type": "JOB",
        "ptv2.kind": "sweep",
        "ptv2.study": "intents-0123456789ab",
        "ptv2.stopped": "no better trial in 16",
        "ptv2.winner": "0",
        "task": "intents",
        "metric": "accuracy",
        "flow_run": "brave-fox",
    }
    assert note.startswith("Trial 0 won: dev accuracy 0.6875, spread 0.0884 over 2 seeds.")
    assert "4 trials (1 complete, 1 pruned, 1 failed, 1 crashed), 4 epochs" in note
    assert "ptv2 apply intents" in note


def test_log_sweep_keeps_its_files(root: Path) -> None:
    run_id = log(root, sweep(*TRIALS))
    listed = {file.path for file in client(root).list_artifacts(run_id, "sweep")}
    assert listed == {"sweep/sweep.json", "sweep/study.html", "sweep/history.png"}


def test_log_sweep_makes_a_child_run_of_each_trial(root: Path) -> None:
    run_id = log(root, sweep(*TRIALS, finalists=(WON,)))
    children = runs(root, "trial")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {run_id}
    assert [run.info.run_name for run in children] == ["trial 0", "trial 1", "trial 2", "trial 3"]
    assert [run.info.status for run in children] == ["FINISHED", "FINISHED", "FAILED", "FAILED"]
    assert [run.data.tags["ptv2.trial_state"] for run in children] == [
        "complete", "pruned", "failed", "crashed",
    ]  # fmt: skip
    assert [run.info.end_time - run.info.start_time for run in children] == [4000, 2000, 500, 4000]
    first, second, failed, crashed = children
    assert first.data.params == {"prompt.length": "16", "learning_rate": "0.01"}
    assert first.data.metrics == {
        "dev_accuracy": 0.75,
        "best_dev_accuracy": 0.75,
        "epochs": 2,
        "seconds": 4.0,
        "mean_accuracy": 0.6875,
        "spread_accuracy": 0.0884,
    }
    assert second.data.metrics == {
        "dev_accuracy": 0.25, "best_dev_accuracy": 0.25, "epochs": 1, "seconds": 2.0,
    }  # fmt: skip
    assert failed.data.metrics == {"epochs": 0, "seconds": 0.5}
    assert failed.data.tags["mlflow.note.content"] == "the loss was not finite"
    assert first.data.tags["ptv2.origin"] == "baseline"
    assert crashed.data.tags["ptv2.origin"] == "first"
    assert crashed.data.tags["ptv2.retries"] == "2"


def test_log_sweep_draws_each_trial_by_epoch(root: Path) -> None:
    log(root, sweep(trial(0, epochs=(0.5, 0.75, 0.625), seconds=6.0)))
    (run,) = runs(root, "trial")
    curve = client(root).get_metric_history(run.info.run_id, "dev_accuracy")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 0.75), (3, 0.625)]
    assert [point.timestamp - run.info.start_time for point in curve] == [2000, 4000, 6000]


# Once and only once


def test_log_sweep_again_writes_nothing(root: Path) -> None:
    record = sweep(*TRIALS)
    run_id = log(root, record)
    before = rows(root)
    assert log(root, record) == run_id
    assert rows(root) == before


def test_log_sweep_with_more_trials_goes_on_with_its_run(root: Path) -> None:
    first = log(root, sweep(trial(0), trial(1), stopped="no better trial in 16"))
    untouched = runs(root, "trial")[1].info.run_id
    before = rows(root)
    more = sweep(
        trial(0), trial(1), trial(2, value=0.875, epochs=(0.875,)), finalists=(finalist(2),)
    )
    assert log(root, more) == first
    (run,) = runs(root, "sweep")
    children = runs(root, "trial")
    assert [child.data.tags["ptv2.trial"] for child in children] == ["0", "1", "2"]
    assert children[1].info.run_id == untouched
    for name in ("metrics", "params", "tags"):
        kept = [row for row in before[name] if untouched in row]
        assert [row for row in rows(root)[name] if untouched in row] == kept
    assert run.data.metrics["best_dev_accuracy"] == 0.875
    assert run.data.metrics["trials"] == 3
    assert run.data.tags["ptv2.winner"] == "2"
    assert run.data.tags["ptv2.stopped"] == "after the 3 trials that were asked for"
    assert run.info.status == "FINISHED"


def test_log_sweep_with_a_new_picture_logs_that(root: Path) -> None:
    record = sweep(*TRIALS)
    run_id = log(root, record)
    (root / "sweep" / "contour.png").write_bytes(b"png")
    assert log(root, record) == run_id
    listed = {file.path for file in client(root).list_artifacts(run_id, "sweep")}
    assert "sweep/contour.png" in listed
    assert len(runs(root, "trial")) == len(TRIALS)


def test_log_sweep_keeps_params_that_changed_as_they_were(root: Path) -> None:
    record = sweep(*TRIALS)
    log(root, record)
    log(root, record, params={"search.epochs": "3", "workers": "2"})
    (run,) = runs(root, "sweep")
    assert run.data.params == {"search.epochs": "2", "workers": "2"}


def test_log_sweep_of_another_study_makes_another_run(root: Path) -> None:
    first = log(root, sweep(trial(0)))
    second = log(root, sweep(trial(0), study="intents-ffffffffffff"))
    assert {run.info.run_id for run in runs(root, "sweep")} == {first, second}
    assert len(runs(root, "trial")) == 2


STEPS = ["create_experiment", "create_run", "log_batch", "log_artifact", "set_tag",
         "set_terminated"]  # fmt: skip


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_log_sweep_cut_off_after_any_step_is_completed_by_the_next(
    step: str, at: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    class PowerCutError(BaseException):
        pass

    original: Callable[..., Any] = getattr(MlflowClient, step)
    calls = 0

    def cut_off(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        done = original(*arguments, **named)
        calls += 1
        if calls == at:
            raise PowerCutError
        return done

    record = sweep(trial(0), trial(1, state="failed", epochs=(0.5,), value=None))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, cut_off)
        if at == 1 or step in ("create_run", "log_batch", "log_artifact", "set_terminated"):
            with pytest.raises(PowerCutError):
                log(root, record)
        else:
            log(root, record)  # a step that is taken once
    log(root, record)
    (run,) = runs(root, "sweep")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["trials"] == 2
    children = runs(root, "trial")
    assert [child.info.status for child in children] == ["FINISHED", "FAILED"]
    curves = [
        client(root).get_metric_history(child.info.run_id, "dev_accuracy") for child in children
    ]
    assert [[point.value for point in curve] for curve in curves] == [[0.5, 0.75], [0.5]]
    listed = {file.path for file in client(root).list_artifacts(run.info.run_id, "sweep")}
    assert listed == {"sweep/sweep.json", "sweep/study.html", "sweep/history.png"}


# What cannot work


def test_log_sweep_to_a_deleted_experiment_is_told(root: Path) -> None:
    log(root, sweep(trial(0)))
    asked = client(root)
    asked.delete_experiment(asked.get_experiment_by_name("ptv2").experiment_id)
    with pytest.raises(RegistryError, match="'ptv2'.*is deleted; restore it"):
        log(root, sweep(trial(0)))


def test_log_sweep_that_the_registry_refuses_says_what_to_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    with pytest.raises(
        RegistryError, match=r"No space left.*run `ptv2 sweep --task intents` again"
    ):
        log(root, sweep(trial(0)))


def test_log_sweep_cuts_a_message_that_is_too_long(root: Path) -> None:
    long = replace(TRIALS[2], number=0, message="x" * 10_000)
    log(root, sweep(long, finalists=(finalist(0),)))
    (run,) = runs(root, "trial")
    assert run.data.tags["mlflow.note.content"] == "x" * 5000
