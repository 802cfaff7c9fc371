"""Several processes that train together: as one process would, to the rounding of their sums."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptv2_core.errors import ConfigError
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import TrainReport
from tests.core.processes import Child
from tests.core.training_parts import Bench, assert_close, settings, weights
from tests.core.workers import TeamPlan, TeamResult, train_in_team

Folder = Callable[[str], Path]

# a sum in parts rounds otherwise
LOSS_ATOL = 1e-5
# AdamW divides a gradient by its own size: one near zero carries its rounding into the weight
WEIGHT_ATOL = 1e-4
DROPOUT: dict[str, Any] = {"prompt": {"length": 4, "dropout": 0.2}, "head": {"dropout": 0.2}}
ROWS = (40, 24)


def plan_of(folder: Path, tmp_path: Path, *, size: int = 2, **changes: Any) -> TeamPlan:
    """Return a plan for a new team."""
    plan = TeamPlan(
        folder=folder,
        kind="classification",
        rows=ROWS,
        config=settings(**DROPOUT),
        store=tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}",
        size=size,
    )
    return replace(plan, **changes)


def run_team(plan: TeamPlan) -> list[TeamResult]:
    """Run a team to its end; returns what each process said, the first of rank 0."""
    children = [Child(train_in_team, plan, rank) for rank in range(plan.size)]
    try:
        results: list[TeamResult] = [child.receive() for child in children]
        for child in children:
            child.go_on()
        assert [child.join() for child in children] == [0] * plan.size
    finally:
        for child in children:
            child.kill()
    return results


def assert_same_reports(got: list[TrainReport], wanted: list[TrainReport]) -> None:
    """Assert that reports say the same to rounding, and their evaluations predict the same."""
    assert [(r.step, r.epoch, r.is_best) for r in got] == [
        (r.step, r.epoch, r.is_best) for r in wanted
    ]
    for one, other in zip(got, wanted, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=LOSS_ATOL)
        assert one.learning_rate == other.learning_rate
        assert one.grad_norm == pytest.approx(other.grad_norm, abs=LOSS_ATOL, rel=1e-4)
        assert (one.evaluation is None) == (other.evaluation is None)
        if one.evaluation is not None and other.evaluation is not None:
            assert one.evaluation.score == other.evaluation.score
            assert one.evaluation.metrics == other.evaluation.metrics
            assert one.evaluation.predictions == other.evaluation.predictions
            assert one.evaluation.loss == pytest.approx(other.evaluation.loss, abs=LOSS_ATOL)


def assert_one_result(results: list[TeamResult]) -> None:
    """Assert that all processes of a team end with the same bits and have said the same."""
    first = results[0]
    for other in results[1:]:
        assert other.error == first.error
        assert other.weights.keys() == first.weights.keys()
        for name, array in first.weights.items():
            assert array.tobytes() == other.weights[name].tobytes(), name
        assert other.reports == first.reports


def assert_as_one_process(
    results: list[TeamResult], bench: Bench, plan: TeamPlan
) -> list[TrainReport]:
    """Assert that a team did what one process does; returns its reports."""
    model, wanted = bench.run(plan.config)
    assert_one_result(results)
    assert results[0].error is None
    assert_same_reports(results[0].reports, wanted)
    got = {name: torch.from_numpy(array) for name, array in results[0].weights.items()}
    given = weights(model)
    if plan.kind == "multiple_choice":
        # it moves all options alike: its gradient is nothing but rounding
        del got["heads.0.linear.bias"], given["heads.0.linear.bias"]
    assert_close(got, given, atol=WEIGHT_ATOL)
    return wanted


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["classification", "tagging", "multiple_choice"])
def test_team_trains_as_one_process(
    backbone_folder: Folder, tmp_path: Path, kind: str, size: int
) -> None:
    plan = plan_of(backbone_folder("bert"), tmp_path, size=size, kind=kind)
    wanted = assert_as_one_process(run_team(plan), Bench(plan.folder, kind, rows=ROWS), plan)
    assert len({r.train_loss for r in wanted}) == len(wanted) == 6


@pytest.mark.parametrize(
    "changes",
    [
        # a step of 13, 13, 13 and 1 rows; and steps of 2 rows among 3 processes
        {"batch_size": 13},
        {"batch_size": 2, "epochs": 1},
        # no batch for two of the three in evaluation, few rows for each
        {"token_budget": 4096, "batch_size": 40},
        # many batches in evaluation
        {"token_budget": 32},
        {
            "prompt": {"length": 4, "reparameterization": "mlp", "mlp_hidden": 8},
            "gradient_checkpointing": True,
        },
        {"method": "finetune", "learning_rate": 1e-5},
    ],
    ids=["a-row-too-few", "fewer-rows", "one-batch", "many-batches", "mlp", "finetune"],
)
def test_team_of_any_batches_trains_as_one_process(
    backbone_folder: Folder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(**{**DROPOUT, **changes})
    plan = plan_of(backbone_folder("bert"), tmp_path, size=3, config=config)
    assert_as_one_process(run_team(plan), Bench(plan.folder, rows=ROWS), plan)


def test_team_of_one_is_bitwise_one_process(backbone_folder: Folder, tmp_path: Path) -> None:
    plan = plan_of(backbone_folder("bert"), tmp_path, size=1)
    (result,) = run_team(plan)
    model, wanted = Bench(plan.folder, rows=ROWS).run(plan.config)
    assert [r.train_loss for r in result.reports] == [r.train_loss for r in wanted]
    for name, tensor in weights(model).items():
        assert np.array_equal(result.weights[name], tensor.numpy()), name


def test_team_shares_a_trunk(backbone_folder: Folder, tmp_path: Path) -> None:
    config = settings(prompt={"length": 4, "layers": 2, "dropout": 0.2})
    folder = tmp_path / "trunk"
    plan = plan_of(backbone_folder("bert"), tmp_path, config=config, trunk=folder)
    assert_as_one_process(run_team(plan), Bench(plan.folder, rows=ROWS), plan)
    assert len(list(folder.glob("*.npy"))) == 2


def test_team_refuses_draws_that_would_depend_on_its_size(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    config = settings(backbone_dropout=True)
    reports = bench.start(bench.model(config), config, team=Team(rank=0, size=2))
    with pytest.raises(ConfigError, match=r"train\.backbone_dropout: expected false where several"):
        next(reports)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_team_stops_together_at_a_loss_that_is_not_finite(
    backbone_folder: Folder, tmp_path: Path, poisoned: int
) -> None:
    results = run_team(plan_of(backbone_folder("bert"), tmp_path, poisoned=poisoned))
    assert_one_result(results)
    for result in results:
        assert [r.step for r in result.reports] == [1, 2]
        assert result.error is not None
        assert "loss nan" in result.error
        assert "step 3 (epoch 1)" in result.error
        assert all(np.isfinite(array).all() for array in result.weights.values())


@pytest.mark.parametrize("resumed_by", [1, 2, 3])
def test_team_checkpoint_is_gone_on_from_by_any_number(
    backbone_folder: Folder, tmp_path: Path, resumed_by: int
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    plan = plan_of(backbone_folder("bert"), tmp_path, checkpoint=file, last_step=4)
    assert_one_result(run_team(plan))
    again = plan_of(backbone_folder("bert"), tmp_path, checkpoint=file, size=resumed_by)
    results = run_team(again)
    assert_one_result(results)
    bench = Bench(plan.folder, rows=ROWS)
    model, wanted = bench.run(plan.config)
    first, *rest = results[0].reports
    assert first.is_resumed
    assert first.step == 4
    assert_same_reports(rest, wanted[4:])
    got = {name: torch.from_numpy(array) for name, array in results[0].weights.items()}
    assert_close(got, weights(model), atol=WEIGHT_ATOL)


def test_team_goes_on_from_the_checkpoint_of_one_process(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    plan = plan_of(backbone_folder("bert"), tmp_path, checkpoint=file)
    bench = Bench(plan.folder, rows=ROWS)
    model = bench.model(plan.config)
    steps = bench.start(model, plan.config, checkpoint=Checkpoint(file, every_steps=1))
    for report in steps:
        if report.step == 2:
            break
    steps.close()  # type: ignore[attr-defined]
    results = run_team(plan)
    assert_one_result(results)
    whole, wanted = bench.run(plan.config)
    first, *rest = results[0].reports
    assert first.is_resumed
    assert_same_reports(rest, wanted[2:])
    got = {name: torch.from_numpy(array) for name, array in results[0].weights.items()}
    assert_close(got, weights(whole), atol=WEIGHT_ATOL)
