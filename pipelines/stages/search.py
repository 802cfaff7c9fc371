"""search: find the settings of `train` that score best on dev."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptv2_core
from pipelines.paths import TaskPaths
from pipelines.settings import TaskSettings
from pipelines.stages import Progress, silent
from pipelines.stages.prepare import Prepared
from pipelines.stages.training import backbone_for, overlay, start_training
from pipelines.study import Study, Trial
from pipelines.tables import csv_text
from ptv2_core.files import replace_directory, write_json_atomic, write_text_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.training.start import check_positions

BEST_FILE = "best.json"
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
    """

    task: str
    metric: str
    value: float | None
    trial: int | None
    study: str | None
    n_trials: dict[str, int]
    train: dict[str, Any]


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
            write_json_atomic(folder / BEST_FILE, vars(result))
            write_text_atomic(folder / "trials.csv", csv_text(["trial", "state", "value"], []))
            write_text_atomic(folder / "search.html", NOTHING_SEARCHED)
        return result
    backbone = backbone_for(settings, prepared)
    _check_space(settings, backbone, prepared)
    study = Study(
        database=paths.study,
        name=study_name(settings, prepared, backbone),
        search=settings.search,
        baseline=_baseline(settings),
    )

    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        config = overlay(settings.train, {**changes, "epochs": settings.search.epochs})
        _, reports = start_training(backbone, prepared, config)
        return (r.evaluation.score for r in reports if r.evaluation is not None)

    def on_trial(trial: Trial, done: int) -> None:
        progress(f"trial {trial.number} {trial.summary()}", done, settings.search.n_trials)

    outcome = study.run(scores, on_trial)
    result = SearchResult(
        task=settings.name,
        metric=prepared.task.metric,
        value=outcome.best.value,
        trial=outcome.best.number,
        study=study.name,
        n_trials=outcome.counts,
        train=outcome.best.changes,
    )
    with replace_directory(paths.search) as folder:
        write_json_atomic(folder / BEST_FILE, vars(result))
        study.write_trials(folder / "trials.csv")
        study.write_plots(folder / "search.html", task=settings.name, metric=result.metric)
    return result


def study_name(settings: TaskSettings, prepared: Prepared, backbone: Backbone) -> str:
    """Return a name that changes with everything a trial's score depends on.

    `n_trials` is left out, so that a search can be made longer.
    """
    everything = {
        "search": {**settings.search.model_dump(mode="json"), "n_trials": None},
        "train": settings.train.to_mapping(),
        "data": prepared.digests,
        "labels": prepared.task.labels,
        "encoding": [prepared.max_length, prepared.tokenizer_digest],
        "backbone": [backbone.spec.digest, str(backbone.dtype), backbone.device.type],
        "core": _core_digest(),
    }
    text = json.dumps(everything, sort_keys=True)
    return f"{settings.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _baseline(settings: TaskSettings) -> dict[str, Any]:
    """Return the settings of `train` that the space has a range for."""
    train = settings.train
    values = {
        "prompt_length": train.prompt.length,
        "learning_rate": train.learning_rate,
        "reparameterization": train.prompt.reparameterization,
        "prompt_dropout": train.prompt.dropout,
    }
    searched = settings.search.space.model_dump(exclude_none=True)
    return {name: value for name, value in values.items() if name in searched}


def _core_digest() -> str:
    """Hash the core's source: a trial of older code says nothing about this one."""
    folder = Path(ptv2_core.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _check_space(settings: TaskSettings, backbone: Backbone, prepared: Prepared) -> None:
    """Refuse a space whose longest prompt does not fit, before the first trial."""
    limits = settings.search.space.prompt_length
    longest = limits[1] if limits else settings.train.prompt.length
    setting = "search.space.prompt_length" if limits else "train.prompt.length"
    check_positions(backbone, longest, list(prepared.splits.values()), setting=setting)
