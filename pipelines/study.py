"""Optuna: a study on SQLite that a killed search goes on with, to exactly its number of trials."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from pipelines.errors import PipelineError
from pipelines.paths import alone
from pipelines.schema import SearchSettings, SearchSpace, nested
from pipelines.study_pruners import INTERRUPTED, RETRY_OF, new_pruner
from pipelines.tables import csv_text
from ptv2_core.config import TrainConfig
from ptv2_core.errors import ConfigError, TrainingError
from ptv2_core.files import write_text_atomic

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
STARTUP_TRIALS = 3
"""Drawn by chance before the sampler learns; few, since a short search has no more to give."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One finished trial.

    Attributes:
        number: Optuna's.
        state: `complete`, `pruned` or `failed`.
        value: The best score over its epochs; none where it failed.
        params: What was drawn.
    """

    number: int
    state: str
    value: float | None
    params: dict[str, Any]

    @property
    def changes(self) -> dict[str, Any]:
        """What was drawn, nested as in the train section."""
        return nested(self.params)

    def summary(self) -> str:
        """Return one line about the trial."""
        drawn = ", ".join(f"{name} {_short(value)}" for name, value in self.params.items())
        score = "" if self.value is None else f" {self.value:.4f}"
        return f"{self.state}{score} ({drawn})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished study.

    Attributes:
        best: The trial with the best score.
        counts: Trials by state.
    """

    best: Trial
    counts: dict[str, int]


class Lanes(Protocol):
    """Where trials train side by side, each in a lane of its own."""

    def start(self, lane: int, changes: Mapping[str, Any]) -> None:
        """Begin a trial with nested changes to the train section, in a lane that is free."""
        ...

    def next(self, lane: int) -> float | None:
        """Return the score of the lane's next epoch; None at its end, and the lane is free.

        Raises:
            TrainingError: The trial cannot go on, and the lane is free.
        """
        ...

    def stop(self, lane: int) -> None:
        """Give the lane's trial up."""
        ...


class OneByOne:
    """Lanes in this process: their epochs take turns."""

    def __init__(self, scores: Callable[[Mapping[str, Any]], Iterator[float]]) -> None:
        """Train with `scores`, which takes a trial's changes and yields a score an epoch."""
        self._scores = scores
        self._running: dict[int, Iterator[float]] = {}

    def start(self, lane: int, changes: Mapping[str, Any]) -> None:
        """Begin a trial."""
        self._running[lane] = self._scores(changes)

    def next(self, lane: int) -> float | None:
        """Return the score of the lane's next epoch, or None at its end."""
        return next(self._running[lane], None)

    def stop(self, lane: int) -> None:
        """Give the lane's trial up."""
        del self._running[lane]


@dataclass(kw_only=True)
class _Running:
    """A trial that is training."""

    trial: optuna.Trial
    epoch: int = 0
    best: float | None = None


class Study:
    """A search of one task."""

    def __init__(
        self,
        *,
        database: Path,
        name: str,
        search: SearchSettings,
        baseline: Mapping[str, Any] | None = None,
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Open or make the study.

        Args:
            database: SQLite file; one search at a time writes it.
            name: Changes with everything a trial depends on, so that studies never mix.
            search: Space, number of trials, how many side by side, pruner and seed.
            baseline: The settings of `train`, by the names of the space; tried before all else if
                they lie in the space, so that a search never ends below them.
            first: Settings to try next, before those of `search.first`.
        """
        # Optuna announces every trial on its own logger; the stage draws progress instead
        optuna.logging.set_verbosity(logging.WARNING)
        database.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._search = search
        self._baseline = baseline
        self._first = first
        self._lock = database.with_suffix(".lock")
        self._study = optuna.create_study(
            study_name=name,
            storage=f"sqlite:///{database}",
            direction="maximize",
            load_if_exists=True,
            pruner=new_pruner(search),
        )

    def run(self, lanes: Lanes, on_trial: Callable[[Trial, int], None]) -> Outcome:
        """Run trials until the study has `n_trials` finished ones.

        `parallel` lanes are kept busy. Their epochs are looked at in turn, lane by lane, however
        fast each is: what is drawn and what is pruned depends on no clock.

        Args:
            lanes: Where the trials train.
            on_trial: Called with every finished trial and how many there are.

        Raises:
            PipelineError: Another search holds the study, or no trial ended with a score.
        """
        with alone(self._lock, "search"):
            self._retry_interrupted()
            self._enqueue_first()
            running: dict[int, _Running] = {}
            while True:
                for lane in range(self._search.parallel):
                    if lane not in running:
                        begun = len(self.finished()) + len(running)
                        if begun < self._search.n_trials:
                            running[lane] = self._begin(lanes, lane, begun)
                if not running:
                    break
                for lane in sorted(running):
                    if self._is_over(lanes, lane, running[lane]):
                        number = running.pop(lane).trial.number
                        finished = self.finished()
                        ended = next(one for one in finished if one.number == number)
                        on_trial(ended, len(finished))
        return self.outcome()

    def outcome(self) -> Outcome:
        """Return what the finished trials gave.

        Raises:
            PipelineError: None ended with a score.
        """
        finished = self.finished()
        scored = [trial for trial in finished if trial.state == "complete"]
        if not scored:
            raise PipelineError(
                f"search: none of {len(finished)} trials ended with a score; the loss was not "
                "finite. Lower search.space.learning_rate or set backbone.precision to fp32."
            )
        counts = {
            state: sum(trial.state == state for trial in finished)
            for state in ("complete", "pruned", "failed")
        }
        # the first of equals: max() keeps the earlier one
        return Outcome(best=max(scored, key=lambda trial: trial.value or 0.0), counts=counts)

    def _begin(self, lanes: Lanes, lane: int, begun: int) -> _Running:
        self._study.sampler = new_sampler(self._search.seed, begun)
        trial = self._study.ask()
        params = suggest(trial, self._search.space)
        lanes.start(lane, nested(params))
        return _Running(trial=trial)

    def _is_over(self, lanes: Lanes, lane: int, running: _Running) -> bool:
        """Take a lane's next epoch, and tell the study where it was the trial's last."""
        trial = running.trial
        try:
            score = lanes.next(lane)
        except TrainingError as error:
            trial.set_user_attr("error", str(error))
            self._study.tell(trial, state=TrialState.FAIL)
            return True
        if score is None:
            self._study.tell(trial, running.best)
            return True
        running.epoch += 1
        running.best = score if running.best is None else max(running.best, score)
        trial.report(score, running.epoch)
        if running.epoch < self._search.epochs and trial.should_prune():
            lanes.stop(lane)
            self._study.tell(trial, state=TrialState.PRUNED)
            return True
        return False

    def _enqueue_first(self) -> None:
        if self._baseline and self._search.space.contains(self._baseline):
            self._study.enqueue_trial(dict(self._baseline), skip_if_exists=True)
        asked = [trial.model_dump(exclude_none=True) for trial in self._search.first]
        for first in (*self._first, *asked):
            self._study.enqueue_trial(dict(first), skip_if_exists=True)

    def _retry_interrupted(self) -> None:
        """Give up trials whose process died, and queue their settings again."""
        # this, too, may have been cut off: what is queued again already is not queued twice
        retried = {
            trial.user_attrs.get(RETRY_OF) for trial in self._study.get_trials(deepcopy=False)
        }
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in retried:
                # one that died before it drew anything still has what it was queued with
                queued = trial.system_attrs.get("fixed_params", {})
                self._study.enqueue_trial(
                    {**queued, **trial.params}, user_attrs={RETRY_OF: trial.number}
                )
            self._study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def finished(self) -> list[Trial]:
        """Return the finished trials, in the order they began."""
        frozen = self._study.get_trials(deepcopy=False, states=FINISHED)
        finished = [_trial(one) for one in frozen if INTERRUPTED not in one.user_attrs]
        # a study that was longer once answers as one of this length
        return finished[: self._search.n_trials]

    def write_trials(self, path: Path) -> None:
        """Write a row a trial: number, state, value and what was drawn."""
        trials = self.finished()
        names = sorted({name for trial in trials for name in trial.params})
        rows = [
            [
                trial.number,
                trial.state,
                "" if trial.value is None else trial.value,
                *(trial.params.get(name, "") for name in names),
            ]
            for trial in trials
        ]
        write_text_atomic(path, csv_text(["trial", "state", "value", *names], rows))

    def write_plots(self, path: Path, *, task: str, metric: str) -> None:
        """Write one self-contained page with Optuna's plots."""
        plots = optuna.visualization
        figures = [
            plots.plot_optimization_history(self._study, target_name=f"dev {metric}"),
            plots.plot_intermediate_values(self._study),
            plots.plot_parallel_coordinate(self._study, target_name=f"dev {metric}"),
            plots.plot_slice(self._study, target_name=f"dev {metric}"),
        ]
        parts = [
            figure.to_html(full_html=False, include_plotlyjs=place == 0, div_id=f"plot-{place}")
            for place, figure in enumerate(figures)
        ]
        title = f"Search of {task}: {self.name}"
        body = "\n".join(parts)
        write_text_atomic(
            path,
            "<!doctype html>\n"
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
            f'<body style="font-family: sans-serif; margin: 2rem">\n<h1>{title}</h1>\n{body}\n'
            "</body></html>\n",
        )


def reachable(search: SearchSettings, train: TrainConfig) -> SearchSettings:
    """Return the search without what has no effect on the method, or on a prompt that is given.

    Raises:
        ConfigError: Nothing is left to search.
    """
    without: set[str] = set()
    if train.method in ("finetune", "probe"):
        without = {"prompt_length", "reparameterization", "prompt_dropout", "prompt_layers"}
    elif train.method == "prompt_tuning":
        without = {"reparameterization", "prompt_layers"}
    elif train.init_from is not None:
        without = {"prompt_length", "reparameterization", "prompt_layers"}
    if not without:
        return search
    space = search.space.model_copy(update=dict.fromkeys(without))
    if not space.model_dump(exclude_none=True):
        why = f"train.method: {train.method}" + (" with init_from" if train.init_from else "")
        raise ConfigError(
            f"search.space: none of its settings has an effect with {why}; expected a range for "
            "learning_rate, or search.n_trials: 0"
        )
    first = tuple(trial.model_copy(update=dict.fromkeys(without)) for trial in search.first)
    return search.model_copy(update={"space": space, "first": first, "screen": None})


def suggest(trial: optuna.Trial, space: SearchSpace) -> dict[str, Any]:
    """Draw what a space has a range for; returned by its names."""
    drawn: dict[str, Any] = {}
    if space.prompt_length:
        low, high = space.prompt_length
        drawn["prompt_length"] = trial.suggest_int("prompt_length", low, high, log=True)
    if space.learning_rate:
        slow, fast = space.learning_rate
        drawn["learning_rate"] = trial.suggest_float("learning_rate", slow, fast, log=True)
    if space.head_learning_rate:
        slow, fast = space.head_learning_rate
        drawn["head_learning_rate"] = trial.suggest_float(
            "head_learning_rate", slow, fast, log=True
        )
    if space.reparameterization:
        drawn["reparameterization"] = trial.suggest_categorical(
            "reparameterization", space.reparameterization
        )
    if space.prompt_dropout:
        drawn["prompt_dropout"] = trial.suggest_float("prompt_dropout", *space.prompt_dropout)
    if space.weight_decay:
        weak, strong = space.weight_decay
        drawn["weight_decay"] = trial.suggest_float("weight_decay", weak, strong, log=True)
    if space.prompt_layers:
        drawn["prompt_layers"] = trial.suggest_categorical("prompt_layers", space.prompt_layers)
    return drawn


def new_sampler(search_seed: int, begun: int) -> optuna.samplers.TPESampler:
    """Return a sampler whose draw depends on the seed and the trials so far alone."""
    seed = int(np.random.SeedSequence([search_seed, begun]).generate_state(1)[0])
    return optuna.samplers.TPESampler(
        seed=seed,
        multivariate=True,
        constant_liar=True,
        n_startup_trials=STARTUP_TRIALS,
    )


def _trial(frozen: FrozenTrial) -> Trial:
    names = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    reported = list(frozen.intermediate_values.values())
    value = max(reported) if reported and frozen.state != TrialState.FAIL else None
    return Trial(
        number=frozen.number, state=names[frozen.state], value=value, params=dict(frozen.params)
    )


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
