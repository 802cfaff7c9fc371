"""Halving decides as Optuna's pruners do, and says the same however often it is asked."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipelines.schema import SearchSettings
from pipelines.study_pruners import INTERRUPTED, RETRY_OF, new_pruner

EPOCHS = 12
TRIALS = 40


def search(pruner: str, grace: int) -> SearchSettings:
    values = {"pruner": pruner, "grace_epochs": grace, "epochs": EPOCHS}
    return SearchSettings.model_validate(values)


def optunas(pruner: str, grace: int) -> optuna.pruners.BasePruner:
    """Return Optuna's own pruner with the same rungs."""
    if pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=grace, max_resource=EPOCHS, reduction_factor=2
        )
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=2)


def lengths(pruner: optuna.pruners.BasePruner) -> list[int]:
    """Return for how many epochs trials are trained whose curves are drawn by chance."""
    study = optuna.create_study(study_name="a-study", direction="maximize", pruner=pruner)
    chooser = random.Random(5)
    trained = []
    for _ in range(TRIALS):
        trial = study.ask()
        score = chooser.random()
        for epoch in range(1, EPOCHS + 1):
            # rounded, so that some are equal
            trial.report(round(score + chooser.uniform(-0.2, 0.2), 1), epoch)
            if epoch < EPOCHS and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, score)
        trained.append(epoch)
    return trained


@pytest.mark.parametrize("grace", [1, 2, 3])
@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_halving_prunes_what_optuna_prunes(pruner: str, grace: int) -> None:
    ours = lengths(new_pruner(search(pruner, grace)))
    assert ours == lengths(optunas(pruner, grace))
    # none before its grace is over, some at each rung
    assert min(ours) == grace
    assert len(set(ours)) > 2


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "hyperband", "none"])
def test_pruner_that_is_asked_again_says_the_same_and_writes_nothing(
    pruner: str, tmp_path: Path
) -> None:
    settings = search(pruner, 1)

    def opened() -> optuna.Study:
        return optuna.create_study(
            study_name="a-study",
            storage=f"sqlite:///{tmp_path / 'study.db'}",
            direction="maximize",
            load_if_exists=True,
            pruner=new_pruner(settings),
        )

    study = opened()
    said = set()
    for number in range(12):
        trial = study.ask()
        for epoch in (1, 2, 3, 4):
            trial.report(1.0 - 0.05 * number, epoch)
            first = trial.should_prune()
            # in another process, which knows the database alone
            again = optuna.trial.Trial(opened(), trial._trial_id).should_prune()
            assert again is first
            said.add(first)
            if first:
                break
        study.tell(trial, 1.0 - 0.05 * number)
    assert said == ({False} if pruner == "none" else {True, False})
    attrs: list[dict[str, Any]] = [one.system_attrs for one in study.get_trials()]
    assert attrs == [{}] * 12


def test_halving_gives_up_a_trial_whose_score_is_no_number() -> None:
    study = optuna.create_study(
        direction="maximize", pruner=new_pruner(search("successive_halving", 1))
    )
    for score in (float("nan"), 0.5):
        trial = study.ask()
        trial.report(score, 4)
        assert trial.should_prune() is (score != 0.5)


def test_halving_counts_an_interrupted_trial_and_its_retry_once() -> None:
    study = optuna.create_study(
        direction="maximize", pruner=new_pruner(search("successive_halving", 1))
    )
    for number, attrs in enumerate(({}, {INTERRUPTED: True}, {RETRY_OF: 1})):
        study.enqueue_trial({}, user_attrs=attrs)
        trial = study.ask()
        trial.report((0.9, 0.8, 0.8)[number], 1)
    # two have reached the rung, and the better one passes
    last = study.ask()
    last.report(0.85, 1)
    assert last.should_prune()
    best = study.ask()
    best.report(0.88, 1)
    assert not best.should_prune(), "the second of four: 0.9, 0.88, 0.85, 0.8"
