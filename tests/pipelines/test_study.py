import csv
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipelines import study as study_module
from pipelines.errors import PipelineError
from pipelines.schema import SearchSettings
from pipelines.settings import child_environment
from pipelines.study import OneByOne, Outcome, Study, Trial
from ptv2_core.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 4
SPACE = {"prompt_length": [2, 64], "learning_rate": [1e-3, 1e-1]}


def open_study(
    folder: Path, *, name: str = "study", baseline: dict[str, Any] | None = None, **search: Any
) -> Study:
    """Open the study in a folder; nothing is pruned unless a test says so."""
    values = {
        "n_trials": 5,
        "epochs": EPOCHS,
        "parallel": 1,
        "pruner": "none",
        "space": SPACE,
        **search,
    }
    return Study(
        database=folder / "studies" / "task.db",
        name=name,
        search=SearchSettings.model_validate(values),
        baseline=baseline,
    )


def curve(changes: Mapping[str, Any]) -> Iterator[float]:
    """Score settings: best near length 16 and learning rate 1e-2, better with each epoch."""
    length, rate = changes["prompt"]["length"], changes["learning_rate"]
    best = 1.0 - abs(math.log2(length) - 4) / 10 - abs(math.log10(rate) + 2) / 10
    for epoch in range(1, EPOCHS + 1):
        yield best * epoch / EPOCHS


class Search:
    """Runs studies and notes what was asked of the objective."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.reported: list[tuple[Trial, int]] = []

    def run(self, study: Study, scores: Any = curve) -> Outcome:
        def noting(changes: Mapping[str, Any]) -> Iterator[float]:
            self.asked.append(dict(changes))
            return iter(scores(changes))

        return study.run(OneByOne(noting), lambda trial, done: self.reported.append((trial, done)))

    @property
    def trials(self) -> list[tuple[str, float | None, dict[str, Any]]]:
        """What each finished trial was, its number left out."""
        return [(trial.state, trial.value, trial.params) for trial, _ in self.reported]


@pytest.fixture
def search() -> Search:
    return Search()


def rows(study: Study, folder: Path) -> list[dict[str, str]]:
    """Return the rows of trials.csv."""
    study.write_trials(folder / "trials.csv")
    with (folder / "trials.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def stored(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Return all trials of the database, whatever their state."""
    storage = f"sqlite:///{folder}/studies/task.db"
    return optuna.load_study(study_name="study", storage=storage).get_trials(deepcopy=False)


def test_study_runs_exactly_its_trials_and_keeps_them(tmp_path: Path, search: Search) -> None:
    outcome = search.run(open_study(tmp_path))
    assert outcome.counts == {"complete": 5, "pruned": 0, "failed": 0}
    assert [done for _, done in search.reported] == [1, 2, 3, 4, 5]
    assert [trial.number for trial, _ in search.reported] == [0, 1, 2, 3, 4]
    best = max((trial for trial, _ in search.reported), key=lambda trial: trial.value or 0.0)
    assert outcome.best == best
    assert outcome.best.changes in search.asked
    again = Search()
    assert again.run(open_study(tmp_path)) == outcome
    assert (again.asked, again.reported) == ([], [])


def test_study_goes_on_when_its_number_is_raised(tmp_path: Path, search: Search) -> None:
    search.run(open_study(tmp_path, n_trials=3))
    more = Search()
    outcome = more.run(open_study(tmp_path, n_trials=5))
    assert [done for _, done in more.reported] == [4, 5]
    assert outcome.counts["complete"] == 5
    assert [row["trial"] for row in rows(open_study(tmp_path), tmp_path)] == list("01234")


def test_study_with_fewer_trials_than_it_has_answers_as_a_shorter_one(
    tmp_path: Path, search: Search
) -> None:
    search.run(open_study(tmp_path))
    less = Search()
    outcome = less.run(open_study(tmp_path, n_trials=2))
    assert less.asked == []
    alone = Search()
    (tmp_path / "alone").mkdir()
    assert outcome == alone.run(open_study(tmp_path / "alone", n_trials=2))
    assert outcome.counts == {"complete": 2, "pruned": 0, "failed": 0}


def test_study_of_another_name_shares_nothing(tmp_path: Path, search: Search) -> None:
    search.run(open_study(tmp_path, n_trials=2))
    other = Search()
    other.run(open_study(tmp_path, name="other", n_trials=2))
    assert [done for _, done in other.reported] == [1, 2]


def test_study_tries_the_first_settings_first_and_once(tmp_path: Path, search: Search) -> None:
    first = [{"prompt_length": 7, "learning_rate": 0.05}, {"prompt_length": 33}]
    search.run(open_study(tmp_path, first=first, n_trials=3))
    assert search.asked[0] == {"prompt": {"length": 7}, "learning_rate": 0.05}
    assert search.asked[1]["prompt"] == {"length": 33}
    more = Search()
    more.run(open_study(tmp_path, first=first, n_trials=5))
    assert len(more.asked) == 2
    assert search.asked[0] not in more.asked
    assert {"length": 33} not in [changes["prompt"] for changes in more.asked]


def test_study_tries_the_settings_of_train_before_all_else(tmp_path: Path, search: Search) -> None:
    baseline = {"prompt_length": 16, "learning_rate": 0.01}
    first = [{"prompt_length": 7, "learning_rate": 0.05}]
    outcome = search.run(open_study(tmp_path, baseline=baseline, first=first, n_trials=4))
    lengths = [changes["prompt"]["length"] for changes in search.asked]
    assert lengths[:2] == [16, 7]
    assert outcome.best.params == baseline, "the best there is for this curve"
    more = Search()
    more.run(open_study(tmp_path, baseline=baseline, first=first, n_trials=5))
    assert len(more.asked) == 1
    assert more.asked[0] not in search.asked


def test_study_leaves_out_settings_of_train_outside_its_space(
    tmp_path: Path, search: Search
) -> None:
    search.run(open_study(tmp_path, baseline={"prompt_length": 65, "learning_rate": 0.01}))
    assert len(search.asked) == 5
    assert max(changes["prompt"]["length"] for changes in search.asked) <= 64


def test_study_draws_inside_its_space_and_nests_what_it_drew(
    tmp_path: Path, search: Search
) -> None:
    space = {
        "prompt_length": [2, 8],
        "learning_rate": [1e-3, 1e-2],
        "reparameterization": ["embedding", "mlp"],
        "prompt_dropout": [0.0, 0.2],
        "prompt_layers": ["all", 2],
    }
    first = [{"prompt_layers": 2}, {"prompt_layers": "all"}]
    search.run(open_study(tmp_path, space=space, first=first, n_trials=4))
    assert [changes["prompt"]["layers"] for changes in search.asked[:2]] == [2, "all"]
    for changes in search.asked:
        assert set(changes) == {"prompt", "learning_rate"}
        assert set(changes["prompt"]) == {"length", "reparameterization", "dropout", "layers"}
        assert changes["prompt"]["layers"] in ("all", 2)
        assert 2 <= changes["prompt"]["length"] <= 8
        assert 1e-3 <= changes["learning_rate"] <= 1e-2
        assert changes["prompt"]["reparameterization"] in ("embedding", "mlp")
        assert 0.0 <= changes["prompt"]["dropout"] <= 0.2


def test_study_draws_the_same_with_the_same_seed(tmp_path: Path) -> None:
    runs = []
    for place, seed in enumerate((1, 1, 2)):
        search = Search()
        search.run(open_study(tmp_path / str(place), seed=seed, n_trials=6))
        runs.append(search.trials)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len({str(params) for _, _, params in runs[0]}) == 6


def _interrupted_in(number: int, *, epoch: int) -> Any:
    """Return an objective that is stopped in an epoch of its nth call."""
    calls = 0

    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        nonlocal calls
        calls += 1
        for place, score in enumerate(curve(changes), start=1):
            if (calls, place) == (number, epoch):
                raise KeyboardInterrupt
            yield score

    return scores


@pytest.mark.parametrize("pruner", ["none", "median", "successive_halving", "hyperband"])
def test_study_that_was_interrupted_ends_with_the_same_trials(pruner: str, tmp_path: Path) -> None:
    whole = Search()
    expected = whole.run(open_study(tmp_path / "whole", n_trials=7, pruner=pruner))
    parts = Search()
    with pytest.raises(KeyboardInterrupt):
        parts.run(
            open_study(tmp_path / "parts", n_trials=7, pruner=pruner), _interrupted_in(5, epoch=2)
        )
    outcome = parts.run(open_study(tmp_path / "parts", n_trials=7, pruner=pruner))
    assert parts.trials == whole.trials
    assert [done for _, done in parts.reported] == [1, 2, 3, 4, 5, 6, 7]
    assert outcome.counts == expected.counts
    assert outcome.best.params == expected.best.params


def test_study_retries_what_was_running_and_does_not_count_it(
    tmp_path: Path, search: Search
) -> None:
    with pytest.raises(KeyboardInterrupt):
        search.run(open_study(tmp_path, n_trials=3), _interrupted_in(2, epoch=2))
    assert [trial.state.name for trial in stored(tmp_path)] == ["COMPLETE", "RUNNING"]
    resumed = Search()
    study = open_study(tmp_path, n_trials=3)
    outcome = resumed.run(study)
    assert resumed.asked[0] == search.asked[1]
    assert len(resumed.asked) == 2
    assert outcome.counts == {"complete": 3, "pruned": 0, "failed": 0}
    assert [trial.state.name for trial in stored(tmp_path)] == [
        "COMPLETE", "FAIL", "COMPLETE", "COMPLETE",
    ]  # fmt: skip
    assert [row["trial"] for row in rows(study, tmp_path)] == ["0", "2", "3"]


@pytest.mark.parametrize("last", ["enqueue_trial", "tell"])
def test_study_cut_off_while_it_retries_tries_no_settings_twice(
    last: str, tmp_path: Path, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        search.run(open_study(tmp_path, n_trials=4), _interrupted_in(2, epoch=2))
    cut_off = open_study(tmp_path, n_trials=4)
    step = getattr(cut_off._study, last)

    def cut(*arguments: Any, **more: Any) -> None:
        if last == "enqueue_trial":
            step(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(cut_off._study, last, cut)
    with pytest.raises(KeyboardInterrupt):
        search.run(cut_off)
    resumed = Search()
    assert resumed.run(open_study(tmp_path, n_trials=4)).counts["complete"] == 4
    assert resumed.asked[0] == search.asked[1]
    tried = [str(changes) for changes in (search.asked[0], *resumed.asked)]
    assert len(set(tried)) == len(tried) == 4


@pytest.mark.parametrize("drawn", ["nothing", "all"])
def test_study_stopped_in_its_first_trial_keeps_the_first_settings(
    drawn: str, tmp_path: Path, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [{"prompt_length": 7, "learning_rate": 0.05}, {"prompt_length": 33}]

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    study = open_study(tmp_path, first=first, n_trials=3)
    if drawn == "nothing":
        monkeypatch.setattr(study_module, "suggest", stopped)
    with pytest.raises(KeyboardInterrupt):
        search.run(study, stopped)
    monkeypatch.undo()
    resumed = Search()
    outcome = resumed.run(open_study(tmp_path, first=first, n_trials=3))
    lengths = [changes["prompt"]["length"] for changes in resumed.asked]
    assert outcome.counts["complete"] == 3
    assert sorted(lengths[:2]) == [7, 33]
    assert {"prompt": {"length": 7}, "learning_rate": 0.05} in resumed.asked


def test_study_prunes_what_is_behind_and_never_before_the_grace(tmp_path: Path) -> None:
    epochs: list[int] = []

    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        is_good = len(epochs) < 4
        epochs.append(0)
        for _ in range(6):
            epochs[-1] += 1
            yield 0.9 if is_good else 0.1

    search = Search()
    study = open_study(tmp_path, n_trials=6, epochs=6, pruner="median", grace_epochs=3)
    outcome = search.run(study, scores)
    assert epochs == [6, 6, 6, 6, 3, 3]
    assert outcome.counts == {"complete": 4, "pruned": 2, "failed": 0}
    assert [state for state, _, _ in search.trials] == ["complete"] * 4 + ["pruned"] * 2
    assert [value for _, value, _ in search.trials] == [0.9] * 4 + [0.1] * 2


def test_study_never_prunes_a_trial_in_its_last_epoch(tmp_path: Path, search: Search) -> None:
    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        yield 1.0 - 0.1 * len(search.asked)

    study = open_study(tmp_path, n_trials=6, epochs=1, pruner="median", grace_epochs=0)
    assert search.run(study, scores).counts == {"complete": 6, "pruned": 0, "failed": 0}


def test_study_counts_a_training_that_cannot_go_on_as_failed(
    tmp_path: Path, search: Search
) -> None:
    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        yield 0.5
        if len(search.asked) == 2:
            raise TrainingError("loss nan")
        yield 0.6

    study = open_study(tmp_path, n_trials=3)
    outcome = search.run(study, scores)
    assert outcome.counts == {"complete": 2, "pruned": 0, "failed": 1}
    assert [(state, value) for state, value, _ in search.trials] == [
        ("complete", 0.6), ("failed", None), ("complete", 0.6),
    ]  # fmt: skip
    assert stored(tmp_path)[1].user_attrs == {"error": "loss nan"}
    assert [row["value"] for row in rows(study, tmp_path)] == ["0.6", "", "0.6"]
    assert outcome.best.number == 0, "the first of equals"


def test_study_whose_trials_all_failed_is_an_error_every_time(
    tmp_path: Path, search: Search
) -> None:
    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        raise TrainingError("loss nan")
        yield 0.0

    expected = r"none of 3 trials ended with a score.*Lower search\.space\.learning_rate"
    for _ in range(2):
        with pytest.raises(PipelineError, match=expected):
            search.run(open_study(tmp_path, n_trials=3), scores)
    assert len(search.asked) == 3


def test_study_is_run_by_one_search_at_a_time(tmp_path: Path, search: Search) -> None:
    refusals: list[str] = []

    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        with pytest.raises(PipelineError) as caught:
            Search().run(open_study(tmp_path, n_trials=2))
        refusals.append(str(caught.value))
        yield 0.5

    outcome = search.run(open_study(tmp_path, n_trials=2), scores)
    assert outcome.counts["complete"] == 2
    lock = tmp_path / "studies" / "task.lock"
    assert refusals == 2 * [
        f"search: another search of this task is running ({lock} is held); wait for it or stop it"
    ]
    assert len(stored(tmp_path)) == 2


def test_study_lets_go_of_its_lock_after_an_error(tmp_path: Path, search: Search) -> None:
    with pytest.raises(KeyboardInterrupt):
        search.run(open_study(tmp_path), _interrupted_in(1, epoch=1))
    assert search.run(open_study(tmp_path)).counts["complete"] == 5


def test_study_table_has_a_row_a_trial(tmp_path: Path, search: Search) -> None:
    study = open_study(tmp_path, n_trials=3)
    search.run(study)
    found = rows(study, tmp_path)
    assert [list(row) for row in found] == [
        ["trial", "state", "value", "learning_rate", "prompt_length"]
    ] * 3
    for row, (trial, _) in zip(found, search.reported, strict=True):
        assert (row["trial"], row["state"]) == (str(trial.number), "complete")
        assert float(row["value"]) == trial.value
        assert float(row["learning_rate"]) == trial.params["learning_rate"]
        assert int(row["prompt_length"]) == trial.params["prompt_length"]


@pytest.mark.parametrize("n_trials", [1, 4])
def test_study_page_needs_nothing_from_the_network(
    n_trials: int, tmp_path: Path, search: Search
) -> None:
    # the plots also show a setting whose values are a text and a number
    space = {**SPACE, "prompt_layers": ["all", 2]}
    study = open_study(tmp_path, n_trials=n_trials, space=space)
    search.run(study)
    study.write_plots(tmp_path / "search.html", task="intents", metric="accuracy")
    page = (tmp_path / "search.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>\n")
    assert "<title>Search of intents: study</title>" in page
    assert [f'id="plot-{place}"' in page for place in range(4)] == [True] * 4
    assert "dev accuracy" in page
    assert re.findall(r"<script[^>]*\ssrc=[^>]*>", page) == []
    assert re.findall(r"<(?:link|img|iframe)\s[^>]*>", page) == []


CHILD = """
import sys, time
from pathlib import Path
from pipelines.study import OneByOne
from tests.pipelines.test_study import curve, open_study

calls = 0

def scores(changes):
    global calls
    calls += 1
    for epoch, score in enumerate(curve(changes), start=1):
        print(f"trial {calls} epoch {epoch}", flush=True)
        if (calls, epoch) == (4, 3):
            time.sleep(600)
        yield score

open_study(Path(sys.argv[1]), n_trials=6).run(OneByOne(scores), lambda trial, done: None)
"""


@pytest.mark.slow
def test_study_goes_on_after_sigkill(tmp_path: Path, search: Search) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "killed")],
        cwd=ROOT,
        env=child_environment({"PYTHONPATH": str(ROOT)}),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout as lines:
        assert any(line == "trial 4 epoch 3\n" for line in lines)
        with pytest.raises(PipelineError, match="another search of this task is running"):
            Search().run(open_study(tmp_path / "killed", n_trials=6))
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    outcome = search.run(open_study(tmp_path / "killed", n_trials=6))
    assert [done for _, done in search.reported] == [4, 5, 6]
    assert outcome.counts == {"complete": 6, "pruned": 0, "failed": 0}
    whole = Search()
    expected = whole.run(open_study(tmp_path / "whole", n_trials=6))
    assert search.trials == whole.trials[3:]
    assert outcome.best.params == expected.best.params
