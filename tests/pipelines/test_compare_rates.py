"""The trainings of a learning-rate window, on a tiny backbone: rates, scores, and what is kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import compare_jobs, compare_rates
from pipelines.compare_rates import finished_runs, is_moved, rates_of, train_all
from pipelines.extra_settings import CompareSettings, WindowSettings
from pipelines.paths import TaskPaths
from pipelines.settings import load_settings
from pipelines.stages.training import backbone_identity, overlay, start_training
from ptv2_core.training.start import MAX_FINETUNING_RATE
from tests.stage_parts import call, make_workspace

WINDOW = WindowSettings(methods=("ptv2",), factor=16.0, points=3, seeds=(1,), train={"epochs": 1})


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a prepared task."""
    root = make_workspace(tmp_path_factory.mktemp("rates") / "workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert [call(stage, "-t", "intents") for stage in ("fetch", "prepare")] == [0, 0]
    return root


@pytest.fixture
def cell(prepared_once: Path, monkeypatch: pytest.MonkeyPatch) -> compare_jobs.Cell:
    """Return the cell of ptv2."""
    monkeypatch.chdir(prepared_once)
    settings = load_settings(prepared_once / "params.yaml").task("intents")
    paths = TaskPaths(root=prepared_once, task="intents")
    identity = backbone_identity(settings)
    return compare_jobs.cell_of(settings, paths, CompareSettings(n_trials=0), "ptv2", identity)


def changed(cell: compare_jobs.Cell, **train: Any) -> compare_jobs.Cell:
    settings = replace(cell.settings, train=overlay(cell.settings.train, train))
    return replace(cell, settings=settings)


def trained(cell: compare_jobs.Cell, window: WindowSettings = WINDOW) -> dict[float, float]:
    runs = train_all(cell, window, 1, torch.get_num_threads())
    return {run.learning_rate: run.dev for run in runs}


@pytest.mark.parametrize(
    ("method", "own", "expected", "moved"),
    [
        ("ptv2", 1e-2, (2.5e-3, 1e-2, 4e-2), False),
        ("finetune", 1e-4, (2.5e-5, 1e-4, 4e-4), False),
        ("finetune", 1e-3, (1.25e-4, 5e-4, 2e-3), True),
        ("probe", 0.5, (0.0625, 0.25, 1.0), True),
    ],
)
def test_compare_rates_are_around_the_own_rate_as_far_as_the_method_goes(
    cell: compare_jobs.Cell, method: str, own: float, expected: tuple[float, ...], moved: bool
) -> None:
    one = changed(cell, method=method, learning_rate=own)
    assert rates_of(one, WINDOW) == expected
    assert is_moved(one, WINDOW) is moved
    if method == "finetune":
        assert max(expected) <= MAX_FINETUNING_RATE


def test_compare_rates_are_evenly_spaced_in_logs(cell: compare_jobs.Cell) -> None:
    rates = rates_of(cell, WindowSettings(methods=("ptv2",)))
    steps = [after / before for before, after in zip(rates, rates[1:], strict=False)]
    assert steps == pytest.approx([100 ** (1 / 8)] * 8, rel=1e-4)
    assert (rates[0], rates[4], rates[8]) == (1e-3, 1e-2, 1e-1)


def test_compare_rates_are_kept_one_by_one_and_score_as_a_training_does(
    cell: compare_jobs.Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished_runs(cell, WINDOW, 1) is None
    started: list[float] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        started.append(arguments[2].learning_rate)
        if len(started) == 2:
            raise KeyboardInterrupt
        return start_training(*arguments, **named)

    monkeypatch.setattr(compare_rates, "start_training", counted)
    with pytest.raises(KeyboardInterrupt):
        trained(cell)
    scores = trained(cell)
    assert started == [2.5e-3, 1e-2, 1e-2, 4e-2]
    found = finished_runs(cell, WINDOW, 1)
    assert found is not None
    assert {run.learning_rate: run.dev for run in found} == scores
    assert {(run.task, run.method, run.seed) for run in found} == {("intents", "ptv2", 1)}
    one = compare_jobs.train(changed(cell, epochs=1), {}, 1, torch.get_num_threads())
    assert scores[1e-2] == one.dev
    # what they depend on makes others of them
    assert finished_runs(cell, WINDOW, 2) is None
    assert finished_runs(changed(cell, batch_size=4), WINDOW, 1) is None
    assert finished_runs(cell, WINDOW.model_copy(update={"train": {}}), 1) is None
    assert finished_runs(replace(cell, backbone=("other", "", "")), WINDOW, 1) is None


def test_compare_rates_of_a_training_that_diverges_count_as_nothing(
    cell: compare_jobs.Cell,
) -> None:
    wild = changed(cell, prompt={"start_std": 1e38})
    runs = train_all(wild, WINDOW, 1, torch.get_num_threads())
    assert [(run.dev, run.is_diverged) for run in runs] == [(0.0, True)] * 3
    assert finished_runs(wild, WINDOW, 1) == runs
