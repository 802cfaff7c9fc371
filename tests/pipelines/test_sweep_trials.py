"""The study of a sweep by itself: what is drawn, told and read; nothing is trained."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from pipelines.errors import PipelineError
from pipelines.schema import SearchSettings
from pipelines.sweep import storages
from pipelines.sweep.storages import patiently
from pipelines.sweep.supervise import Ended
from pipelines.sweep.trials import SweepStudy

PRUNERS = ("none", "median", "successive_halving", "hyperband")
SPACE = {"prompt_length": [2, 64], "learning_rate": [1e-3, 1e-1]}
BASE = {"prompt_length": 4, "learning_rate": 0.01}


def open_study(folder: Path, name: str = "a-study", **search: Any) -> SweepStudy:
    settings = {"space": SPACE, "epochs": 4, "grace_epochs": 1, "pruner": "none", **search}
    return SweepStudy(
        f"sqlite:///{folder / 'sweeps.db'}", name, SearchSettings.model_validate(settings)
    )


def ended(state: Any, message: str = "", retries: int = 0) -> Ended:
    return Ended(state=state, seconds=1.0, retries=retries, message=message)


def run_trial(study: SweepStudy, *scores: float, state: str = "complete") -> int:
    """Ask for a trial and end it with these scores; returns its number."""
    asked = study.ask(1000)
    assert asked is not None
    for epoch, score in enumerate(scores, start=1):
        study.report(asked.number, epoch, score)
    study.tell(asked.number, ended(state))
    return asked.number


def finish(folder: Path, name: str, *params: dict[str, Any], task: str = "intents") -> None:
    """Make a study whose trials have these settings, the best first."""
    study = open_study(folder, name)
    study.begin(task, params[0], params[1:], 0)
    for place in range(len(params)):
        run_trial(study, 0.9 - 0.1 * place)


def test_study_begins_beside_one_whose_sweep_died_before_its_first_trial(tmp_path: Path) -> None:
    best = {"prompt_length": 8, "learning_rate": 0.02}
    finish(tmp_path, "finished", best)
    open_study(tmp_path, "untouched").begin("intents", BASE, [], 0)
    study = open_study(tmp_path)
    study.begin("intents", BASE, [], 3)
    asked = [study.ask(2), study.ask(2)]
    assert [one and one.params for one in asked] == [BASE, best]
    assert [one.origin for one in study.running()] == ["baseline", "transferred"]


def test_study_takes_as_many_settings_of_earlier_studies_as_asked_for(tmp_path: Path) -> None:
    """Studies of one task pass their best on to each other, and so often share it."""
    best, second, other = ({"prompt_length": n, "learning_rate": 0.02} for n in (8, 9, 10))
    finish(tmp_path, "first", best, BASE)
    finish(tmp_path, "second", best, second)
    finish(tmp_path, "of-another-task", other, task="slots")
    study = open_study(tmp_path)
    study.begin("intents", BASE, [], 3)
    asked = [study.ask(10) for _ in range(4)]
    assert [one and one.params for one in asked] == [BASE, best, other, second]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_study_gives_a_trial_up_whose_sweep_died_before_it_said_so(
    pruner: str, tmp_path: Path
) -> None:
    study = open_study(tmp_path, pruner=pruner)
    is_over = False
    while not is_over and len(study.trials()) < 8:
        asked = study.ask(20)
        assert asked is not None
        for epoch in (1, 2, 3, 4):
            is_over = bool(study.report(asked.number, epoch, 0.9 - 0.1 * asked.number))
            if is_over:
                break
        else:
            study.tell(asked.number, ended("complete"))
    assert is_over is (pruner != "none")
    # of that moment the database is all that is left
    after = open_study(tmp_path, pruner=pruner)
    again = after.ask(20)
    assert again is not None
    if is_over:
        assert (again.number, again.is_taken_over) == (asked.number, True)
        assert after.report(again.number, epoch, 0.9 - 0.1 * again.number)


@pytest.mark.parametrize("state", ["complete", "pruned", "failed", "crashed"])
def test_study_reads_how_a_trial_ended_of_this_version_and_of_older_ones(
    state: str, tmp_path: Path
) -> None:
    study = open_study(tmp_path)
    scores = (0.5, 0.7) if state in ("complete", "pruned") else ()
    run_trial(study, *scores, state=state)
    (told,) = study.trials()
    assert (told.state, told.value) == (state, max(scores, default=None))
    (stored,) = study._study.get_trials()
    # Optuna has a state of its own for all others
    assert stored.user_attrs == ({"state": "crashed"} if state == "crashed" else {})
    kept = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    old = optuna.trial.create_trial(
        state=kept.get(state, TrialState.FAIL),
        value=0.7 if state == "complete" else None,
        user_attrs={"state": state},
        intermediate_values=dict(enumerate(scores, start=1)),
    )
    study._study.add_trial(old)
    assert study.trials()[1].state == state


def test_study_stops_only_for_gains_of_trials_that_can_win(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    run_trial(study, 0.5)
    run_trial(study, 0.95, 0.2, state="pruned")
    run_trial(study, 0.9)
    run_trial(study, 0.9)
    assert study.why_stop(2, 0.01) == "", "0.9 is a gain over 0.5, though a pruned one had more"
    run_trial(study, 0.9)
    assert study.why_stop(2, 0.01) == "none of the last 2 trials gained more than 0.01 on dev"
    assert study.why_stop(None, 0.01) == ""


@pytest.mark.parametrize("state", ["failed", "crashed"])
def test_study_does_not_stop_for_trials_that_ended_without_a_word_on_their_settings(
    state: str, tmp_path: Path
) -> None:
    study = open_study(tmp_path)
    run_trial(study, 0.5)
    for _ in range(3):
        run_trial(study, state=state)
    run_trial(study, 0.5)
    assert study.why_stop(2, 0.01) == ""
    run_trial(study, 0.5)
    assert study.why_stop(2, 0.01) == "none of the last 2 trials gained more than 0.01 on dev"


def test_study_knows_seeds_that_failed(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.set_seed_score(3, 43, 0.5)
    study.set_seed_score(3, 44, None)
    assert study.seed_scores() == {(3, 43): 0.5, (3, 44): None}
    assert study.has_seed(3, 44)
    assert not study.has_seed(3, 45)


def test_database_that_says_nothing_is_one_error_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storages, "LOST_FOR_S", -1.0)

    def silent() -> None:
        raise optuna.exceptions.StorageInternalError("")

    with pytest.raises(PipelineError, match="cannot be used: StorageInternalError; no finished"):
        patiently(silent)
