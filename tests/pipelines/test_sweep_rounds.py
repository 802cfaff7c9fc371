"""The two rounds of a sweep: what is trained, when it is over, and who wins; scores are made up."""

import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import load_settings
from pipelines.sweep import training
from pipelines.sweep.looks import Look, seconds_left
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.supervise import Ended
from pipelines.sweep.training import Order
from pipelines.sweep.trials import SweepStudy
from ptv2_core.errors import ConfigError
from tests.pipelines.sweep_engine import open_sweep, run_sweep
from tests.stage_parts import change_params

pytestmark = pytest.mark.slow
OWN = 42
"""The seed of `train`."""

Scores = Callable[[int, int | None], float | None]


@pytest.fixture
def root(sweepable: Path, tmp_path: Path) -> Path:
    """A workspace without any sweep in it."""
    return shutil.copytree(sweepable, tmp_path / "space")


class Trains:
    """Tells scores by trial and seed, at once; none fails."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self.asked: list[tuple[int, int | None]] = []

    def __call__(self, order: Order) -> None:
        number, seed = order.number, order.job.seed
        self.asked.append((number, seed))
        study, score = training.study_of(order), self._scores(number, seed)
        if order.is_finalist:
            assert seed is not None
            study.set_seed_score(number, seed, score)
            return
        study.begun(number)
        if score is not None:
            study.report(number, 1, score)
        state: Any = "failed" if score is None else "complete"
        study.tell(number, Ended(state=state, seconds=0.0, retries=0, message=""))

    @property
    def finalists(self) -> list[tuple[int, int | None]]:
        return sorted(one for one in self.asked if one[1] is not None)


def swept(root: Path, scores: Scores, **changes: Any) -> tuple[SweepRecord, Trains, list[Look]]:
    trains, looks = Trains(scores), list[Look]()
    record = run_sweep(root, train=trains, on_look=looks.append, workers=1, **changes)
    return record, trains, looks


def falling(number: int, seed: int | None) -> float:
    """Score trials the better the earlier they are, whatever the seed."""
    return 0.9 - 0.1 * number


def rising(number: int, seed: int | None) -> float:
    """Score the later ones better."""
    return 0.3 + 0.1 * number


def test_finalists_are_compared_on_the_seeds_that_are_asked_for_now(root: Path) -> None:
    changes = {"finalists": 1, "n_trials": 2}
    before, _, _ = swept(root, falling, seeds=4, **changes)
    assert [(one.number, len(one.scores)) for one in before.finalists] == [(0, 4)]
    # later trials are better, and have fewer seeds than the old finalist
    late = {"finalists": 2, "n_trials": 4, "seeds": 2}
    after, trains, _ = swept(root, lambda n, s: 0.95 if n == 3 else 0.9 - 0.1 * n, **late)
    assert [(one.number, len(one.scores)) for one in after.finalists] == [(3, 2), (0, 2)]
    assert trains.finalists == [(3, OWN + 1)]


def test_finalist_whose_seed_failed_is_not_trained_again(root: Path) -> None:
    def scores(number: int, seed: int | None) -> float | None:
        return None if (number, seed) == (0, OWN + 1) else falling(number, seed)

    changes = {"finalists": 2, "n_trials": 3, "seeds": 3}
    record, trains, looks = swept(root, scores, **changes)
    wanted = [(number, seed) for number in (0, 1) for seed in (OWN + 1, OWN + 2)]
    assert trains.finalists == wanted
    # fewer seeds mean less is known
    assert [(one.number, len(one.scores)) for one in record.finalists] == [(1, 3), (0, 2)]
    again, nothing, _ = swept(root, scores, **changes)
    assert nothing.asked == []
    assert again.finalists == record.finalists
    assert {look.finalists_left for look in looks} <= {0, 1, 2, 3, 4}


def test_finalists_left_are_those_of_now(root: Path) -> None:
    changes = {"finalists": 1, "seeds": 3}
    swept(root, rising, n_trials=2, **changes)
    _, trains, looks = swept(root, rising, n_trials=4, **changes)
    assert trains.finalists == [(3, OWN + 1), (3, OWN + 2)]
    # the seeds of the former finalist are none of these
    assert {look.finalists_left for look in looks} <= {0, 1, 2}


def test_sweep_goes_on_where_a_trial_that_still_ran_brought_a_gain(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_to_stop = threading.Event()
    asked: Callable[..., str] = SweepStudy.why_stop

    def why_stop(self: SweepStudy, *limits: Any) -> str:
        why = asked(self, *limits)
        if why:
            is_to_stop.set()
        return why

    monkeypatch.setattr(SweepStudy, "why_stop", why_stop)
    trains = Trains(lambda number, seed: 0.9 if number == 3 else 0.5)

    def train(order: Order) -> None:
        if order.number == 3 and not order.is_finalist:
            assert is_to_stop.wait(60)
        trains(order)

    record = run_sweep(root, train=train, workers=2, patience=2, margin=0.01, n_trials=20)
    assert record.winner.number == 3
    assert 6 <= len(record.trials) <= 8
    assert record.stopped == "none of the last 2 trials gained more than 0.01 on dev"


def test_sweep_of_an_empty_space_is_refused(root: Path) -> None:
    space = load_settings(root / "params.yaml").task("intents").search.space
    nulls = dict.fromkeys(space.model_dump())
    change_params(root, {"search.space": nulls, "search.n_trials": 0})
    with (
        pytest.raises(ConfigError, match=r"search.space: expected a range .* got none for intents"),
        open_sweep(root),
    ):
        pass
    assert not (root / ".ptv2" / "sweeps.db").exists()


def test_time_left_counts_finalists_from_the_first_trial_on(root: Path) -> None:
    swept(root, falling, n_trials=3, finalists=1, seeds=1)
    with open_sweep(root, workers=1, n_trials=5, finalists=2, seeds=3) as sweep:
        assert sweep._look(None).seconds_left is None
        sweep._trials_s = {0: 2.0}
        look = sweep._look(None)
        assert (len(look.ended), look.finalists_left) == (3, 0)
        # two trials, and two trainings for each of two finalists
        assert look.seconds_left == 2.0 * (2 + 4)
        look = sweep._look(3)
        assert (look.finalists_left, look.seconds_left) == (3, 2.0 * 3)
        sweep._stopped = "no gain"
        assert sweep._look(None).seconds_left == 2.0 * 4


def test_time_left_leaves_out_that_in_which_a_dead_sweep_lay_idle(root: Path) -> None:
    with open_sweep(root) as dead:
        assert dead.study.ask(5) is not None
    with closing(sqlite3.connect(root / ".ptv2" / "sweeps.db")) as database:
        database.execute("UPDATE trials SET datetime_start = datetime(datetime_start, '-1 day')")
        database.commit()
    record, _, looks = swept(root, falling, n_trials=3, finalists=1, seeds=2)
    assert record.trials[0].seconds > 80_000
    left = [look.seconds_left for look in looks if look.seconds_left is not None]
    assert 0 < max(left) < 60


def test_time_left_takes_whole_trials_for_finalists() -> None:
    known = {"complete": {1}, "trials_left": 3, "finalists_left": 2, "workers": 2}
    assert seconds_left({}, [], **known) is None
    assert seconds_left({0: 2.0, 1: 4.0}, [], **known) == (3 * 3.0 + 2 * 4.0) / 2
    assert seconds_left({0: 2.0}, [], **known) == (3 * 2.0 + 2 * 2.0) / 2
    assert seconds_left({}, [6.0], **known) == (3 * 6.0 + 2 * 6.0) / 2
