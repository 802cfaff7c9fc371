"""search: find the settings of `train` that score best on dev."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ptv2_core
from pipelines.paths import BEST_FILE, TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import TaskSettings
from pipelines.stages import Progress, silent
from pipelines.stages.lanes import open_lanes
from pipelines.stages.training import (
    backbone_for,
    backbone_identity,
    load_start,
    overlay,
)
from pipelines.study import Outcome, Study, Trial, reachable
from pipelines.tables import csv_text
from ptv2_core.errors import ConfigError
from ptv2_core.files import replace_directory, source_digest, write_json_atomic, write_text_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.training.start import Start, check_positions

NOTHING_SEARCHED = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>No search</title></head>'
    "<body><p>search.n_trials is 0: the settings of train were taken.</p></body></html>\n"
)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What search found, as `best.json` holds it.

    Attributes:
        task: The task.
        metric: What was maximised on dev.
        value: The best trial's; none where nothing was searched.
        trial: The best trial's number; none where nothing was searched.
        study: The study's name; none where nothing was searched.
        n_trials: Trials by outcome.
        train: Settings to lay over `train`.
        screen: How well a screen told the results; none without one.
    """

    task: str
    metric: str
    value: float | None
    trial: int | None
    study: str | None
    n_trials: dict[str, int]
    train: dict[str, Any]
    screen: "Agreement | None" = None


def run(settings: TaskSettings, paths: TaskPaths, progress: Progress = silent) -> SearchResult:
    """Run trials until the study has `search.n_trials`, and write `results/TASK/search`.

    A killed search goes on where it was: finished trials stay in the study's database.

    Raises:
        ConfigError: A trial's prompt is longer than the backbone's positions allow.
        PipelineError: No trial ended with a score, or another search of this task is running.
    """
    prepared = Prepared.load(paths.prepared)
    if settings.search.n_trials == 0:
        result = SearchResult(
            task=settings.name,
            metric=prepared.task.metric,
            value=None,
            trial=None,
            study=None,
            n_trials={},
            train={},
        )
        with replace_directory(paths.search) as folder:
            write_json_atomic(folder / BEST_FILE, asdict(result))
            write_text_atomic(folder / "trials.csv", csv_text(["trial", "state", "value"], []))
            write_text_atomic(folder / "search.html", NOTHING_SEARCHED)
        return result
    settings = replace(settings, search=reachable(settings.search, settings.train))
    backbone = backbone_for(settings, prepared)
    check_space(settings, backbone, prepared)
    start = load_start(settings, prepared, paths, backbone)
    name = study_name(settings, prepared, backbone_identity(settings), start)
    screen = _screen(settings, paths, prepared, backbone, name, progress)
    study = Study(
        database=paths.study,
        name=name,
        search=settings.search,
        baseline=baseline(settings),
        first=[trial.params for trial in screen.kept] if screen else (),
    )
    outcome = _run(study, settings, paths, prepared, backbone, progress, "trial")
    result = SearchResult(
        task=settings.name,
        metric=prepared.task.metric,
        value=outcome.best.value,
        trial=outcome.best.number,
        study=study.name,
        n_trials=outcome.counts,
        train=outcome.best.changes,
        screen=screen.agreement(study.finished()) if screen else None,
    )
    with replace_directory(paths.search) as folder:
        write_json_atomic(folder / BEST_FILE, asdict(result))
        study.write_trials(folder / "trials.csv")
        study.write_plots(folder / "search.html", task=settings.name, metric=result.metric)
    return result


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well a screen told what the full trainings then gave.

    Attributes:
        layers: Top layers that had a prompt in the screen.
        n_trials: Trials of the screen by outcome.
        compared: Settings that were trained both ways to the end.
        rank_correlation: Spearman's, of their best scores; none for fewer than three, or where one
            side is all equal.
    """

    layers: int
    n_trials: dict[str, int]
    compared: int
    rank_correlation: float | None


@dataclass(frozen=True, kw_only=True)
class Screen:
    """A finished screen: its trials, best first."""

    layers: int
    keep: int
    counts: dict[str, int]
    trials: list[Trial]

    @property
    def kept(self) -> list[Trial]:
        """The trials that the search begins with."""
        return self.trials[: self.keep]

    def agreement(self, full: Sequence[Trial]) -> Agreement:
        """Compare the screen's scores with those of the same settings at full depth."""
        # by settings: those that were drawn twice scored the same twice
        screened = {_drawn(trial): trial.value for trial in self.trials}
        trained = {_drawn(trial): trial.value for trial in full if trial.state == "complete"}
        pairs = [(screened[drawn], trained[drawn]) for drawn in screened if drawn in trained]
        return Agreement(
            layers=self.layers,
            n_trials=self.counts,
            compared=len(pairs),
            rank_correlation=rank_correlation(pairs),
        )


def _drawn(trial: Trial) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(trial.params.items()))


def rank_correlation(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Return Spearman's rank correlation; none for fewer than three, or where one side is flat."""
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    if len(pairs) < 3 or len(set(ours)) == 1 or len(set(theirs)) == 1:
        return None
    # takes most of a second to load, and a search without a screen has no use for it
    from scipy.stats import spearmanr

    return float(spearmanr(ours, theirs).statistic)


def _screen(
    settings: TaskSettings,
    paths: TaskPaths,
    prepared: Prepared,
    backbone: Backbone,
    name: str,
    progress: Progress,
) -> Screen | None:
    """Run the screen that the settings ask for, or go on with it."""
    chosen = settings.search.screen
    if chosen is None:
        return None
    cheap = replace(
        settings,
        train=overlay(settings.train, {"prompt": {"layers": chosen.layers}}),
        search=settings.search.model_copy(update={"n_trials": chosen.n_trials, "screen": None}),
    )
    study = Study(
        database=paths.study,
        name=f"{name}-screen",
        search=cheap.search,
        baseline=baseline(settings),
    )
    what = f"screen of the top {chosen.layers} layers, trial"
    outcome = _run(study, cheap, paths, prepared, backbone, progress, what)
    complete = [trial for trial in study.finished() if trial.state == "complete"]
    ranked = sorted(complete, key=lambda trial: -(trial.value or 0.0))
    return Screen(layers=chosen.layers, keep=chosen.keep, counts=outcome.counts, trials=ranked)


def _run(
    study: Study,
    settings: TaskSettings,
    paths: TaskPaths,
    prepared: Prepared,
    backbone: Backbone,
    progress: Progress,
    what: str,
) -> Outcome:
    """Bring a study to its number of trials."""

    def on_trial(trial: Trial, done: int) -> None:
        progress(f"{what} {trial.number} {trial.summary()}", done, settings.search.n_trials)

    if len(study.finished()) >= settings.search.n_trials:
        return study.outcome()  # nothing to train: no process is started
    with open_lanes(settings, paths, prepared, backbone) as lanes:
        return study.run(lanes, on_trial)


def study_name(
    settings: TaskSettings,
    prepared: Prepared,
    backbone: Sequence[str],
    start: Start | None = None,
) -> str:
    """Return a name that changes with everything a trial's score depends on.

    `n_trials` is left out, so that a search can be made longer.

    Args:
        settings: Of the task.
        prepared: Its data.
        backbone: As `backbone_identity` gives it.
        start: What the trials begin from.
    """
    everything = {
        "search": {**settings.search.model_dump(mode="json"), "n_trials": None},
        "train": settings.train.to_mapping(),
        **prepared.identity(),
        "backbone": list(backbone),
        "start": None if start is None else start.digest,
        # a trial of older code says nothing about this one
        "core": source_digest(Path(ptv2_core.__file__).parent),
    }
    text = json.dumps(everything, sort_keys=True)
    return f"{settings.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def baseline(settings: TaskSettings) -> dict[str, Any]:
    """Return the settings of `train` that the space has a range for."""
    train = settings.train
    values = {
        "prompt_length": train.prompt.length,
        "learning_rate": train.learning_rate,
        "head_learning_rate": train.head_learning_rate,
        "reparameterization": train.prompt.reparameterization,
        "prompt_dropout": train.prompt.dropout,
        "weight_decay": train.weight_decay,
        "prompt_layers": train.prompt.layers,
    }
    searched = settings.search.space.model_dump(exclude_none=True)
    return {name: value for name, value in values.items() if name in searched}


def check_space(settings: TaskSettings, backbone: Backbone, prepared: Prepared) -> None:
    """Refuse a space with a prompt that does not fit, before the first trial."""
    search, train = settings.search, settings.train
    num_layers = backbone.spec.shape.num_layers
    depths = {
        "search.space.prompt_layers": search.space.prompt_layers or (),
        "search.screen.layers": (search.screen.layers,) if search.screen else (),
    }
    for setting, depth in ((name, depth) for name, chosen in depths.items() for depth in chosen):
        if depth != "all" and depth > num_layers:
            raise ConfigError(
                f"{setting}: expected a number of top layers from 1 to {num_layers}, which is what "
                f"the backbone has; got {depth}"
            )
    limits = search.space.prompt_length
    longest = limits[1] if limits else train.prompt.length
    setting = "search.space.prompt_length" if limits else "train.prompt.length"
    for layers in search.space.prompt_layers or (train.prompt.layers,):
        prompt = replace(train.prompt, length=longest, layers=layers)
        config = replace(train, prompt=prompt)
        check_positions(backbone, config, list(prepared.splits.values()), setting=setting)
