"""The work of a comparison: one search for each task and name, one training for each seed.

A job is a function of plain values, so that it can run in a process of its own. What it finds is a
file; a job whose file is there is not run again.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import ptv2_core
from pipelines import compare_items
from pipelines.compare_data import Items, Row, Trial
from pipelines.extra_settings import CompareSettings
from pipelines.paths import TaskPaths, alone
from pipelines.prepared import Prepared, read_examples
from pipelines.schema import FirstTrial, SearchSettings, SearchSpace
from pipelines.settings import TaskSettings
from pipelines.stages.lanes import end_with_parent, one_by_one
from pipelines.stages.search import baseline, check_space, study_name
from pipelines.stages.training import (
    backbone_for,
    overlay,
    start_training,
    trunk_cache,
)
from pipelines.study import Study, reachable
from ptv2_core.artifact import Weights
from ptv2_core.config import Method, TrainConfig
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.files import sha256_file, source_digest, write_json_atomic
from ptv2_core.machine import peak_device_memory_bytes, peak_memory_bytes
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.records import EpochRecord

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A task, and a method or a variant of one.

    Attributes:
        settings: Of the task, with what the method changes and its search laid over them.
        paths: Where its data and the comparison's own files are.
        name: Of the method or the variant.
        backbone: As `backbone_identity` gives it: asked for once, since it reads all weights.
    """

    settings: TaskSettings
    paths: TaskPaths
    name: str
    backbone: tuple[str, str, str]

    @property
    def folder(self) -> Path:
        """Where what the jobs find is kept."""
        return self.paths.root / ".ptv2" / "compare" / self.settings.name


def cell_of(
    settings: TaskSettings,
    paths: TaskPaths,
    compare: CompareSettings,
    name: str,
    backbone: tuple[str, str, str],
) -> Cell:
    """Return the settings of a task under a method or a variant.

    Raises:
        ConfigError: What it changes does not fit the settings of `train`.
    """
    method, space = compare.method_of(name), compare.space_of(name)
    changes = {"method": method, "init_from": None, **compare.changes_of(name)}
    train = overlay(settings.train, changes)
    search = settings.search.model_copy(
        update={
            "n_trials": compare.trials_of(name),
            "parallel": 1,
            "space": space,
            "first": _first(settings.search, space) if method == "ptv2" else (),
            "screen": None,
        }
    )
    if compare.trials_of(name):
        search = reachable(search, train)
    own = replace(settings, train=train, search=search)
    return Cell(settings=own, paths=paths, name=name, backbone=backbone)


def _first(search: SearchSettings, space: SearchSpace) -> tuple[FirstTrial, ...]:
    """Return the first trials of a task's own search, which are settings for ptv2.

    That search has a space of its own: what lies outside of this one would be drawn by chance.
    """
    ranges = space.model_dump(exclude_none=True)
    asked = [
        {key: value for key, value in trial.model_dump(exclude_none=True).items() if key in ranges}
        for trial in search.first
    ]
    return tuple(FirstTrial(**trial) for trial in asked if trial and space.contains(trial))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        changes: The best trial's settings, to lay over `train`.
        trials: All of them.
    """

    changes: Mapping[str, Any]
    trials: tuple[Trial, ...]


def finished_search(cell: Cell) -> Found | None:
    """Return what a search found that has all its trials; None where it has not."""
    settings = cell.settings
    if settings.search.n_trials == 0:
        return Found(changes={}, trials=())
    study = _study(cell, Prepared.load(cell.paths.prepared))
    return _found(cell, study) if len(study.finished()) >= settings.search.n_trials else None


def search(cell: Cell, threads: int) -> Found:
    """Search a cell; goes on with a search that was killed.

    Raises:
        PTv2Error: As the stage `search`.
    """
    begin(threads)
    settings, paths = cell.settings, cell.paths
    prepared = Prepared.load(paths.prepared)
    backbone = backbone_for(settings, prepared)
    check_space(settings, backbone, prepared)
    study = _study(cell, prepared)
    study.run(one_by_one(settings, paths, prepared, backbone), lambda trial, done: None)
    return _found(cell, study)


def _study(cell: Cell, prepared: Prepared) -> Study:
    settings = cell.settings
    return Study(
        database=cell.folder / f"{cell.name}.db",
        name=study_name(settings, prepared, cell.backbone),
        search=settings.search,
        baseline=baseline(settings),
    )


def _found(cell: Cell, study: Study) -> Found:
    trials = tuple(
        Trial(
            task=cell.settings.name,
            method=cell.name,
            number=trial.number,
            value=trial.value,
            settings=trial.params,
            state=trial.state,
        )
        for trial in study.finished()
    )
    return Found(changes=study.outcome().best.changes, trials=trials)


def finished_row(cell: Cell, changes: Mapping[str, Any], seed: int) -> Row | None:
    """Return the row of a run that was finished before; None where there is none."""
    prepared = Prepared.load(cell.paths.prepared)
    file = _row_file(cell, prepared, _config(cell, changes, seed))
    return read_row(file) if file.is_file() else None


def train(cell: Cell, changes: Mapping[str, Any], seed: int, threads: int) -> Row:
    """Train a cell with one seed, score it, and keep the row.

    Raises:
        PTv2Error: As the stages `train` and `evaluate`; or another process does the same.
    """
    begin(threads)
    settings, paths = cell.settings, cell.paths
    prepared = Prepared.load(paths.prepared)
    config = _config(cell, changes, seed)
    file = _row_file(cell, prepared, config)
    with alone(file.with_suffix(".lock"), "run of this comparison"):
        backbone = backbone_for(settings, prepared)
        trunk = trunk_cache(settings, paths)
        model, reports = start_training(backbone, prepared, config, trunk=trunk)
        for report in reports:
            history = report.history
        row = _row(cell, prepared, backbone, model, config, history)
        write_json_atomic(file, asdict(row))
    return row


def _config(cell: Cell, changes: Mapping[str, Any], seed: int) -> TrainConfig:
    return overlay(cell.settings.train, {**changes, "seed": seed})


def _row_file(cell: Cell, prepared: Prepared, config: TrainConfig) -> Path:
    """Return where a row is kept: its name changes with everything it depends on."""
    # a row of other fields cannot be read
    others = [sha256_file(Path(compare_items.__file__)), list(Row.__dataclass_fields__)]
    key = training_key(cell, prepared, config, others)
    return cell.folder / f"{cell.name}-{config.seed}-{key}.json"


def training_key(cell: Cell, prepared: Prepared, config: TrainConfig, others: Sequence[Any]) -> str:
    """Return a text that changes with everything a training depends on, and with some more."""
    parts = [
        config.to_mapping(),
        prepared.identity(),
        cell.backbone,
        [torch.__version__, transformers.__version__],
        source_digest(Path(ptv2_core.__file__).parent),
        *others,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _row(
    cell: Cell,
    prepared: Prepared,
    backbone: Backbone,
    model: PromptedModel,
    config: TrainConfig,
    history: Sequence[EpochRecord],
) -> Row:
    """Score a trained model on dev, then once on test."""
    task, splits, budget = prepared.task, prepared.splits, config.token_budget
    dev = evaluate_model(model, splits["dev"], task, token_budget=budget)
    test = evaluate_model(model, splits["test"], task, token_budget=budget, decoding=dev.decoding)
    weights = Weights.of(model)
    return Row(
        task=cell.settings.name,
        method=cell.name,
        seed=config.seed,
        metric=task.metric,
        dev=dev.score,
        test=test.score,
        tuned_share=weights.num_tuned / backbone.spec.num_parameters,
        tuned_parameters=weights.num_tuned,
        artifact_bytes=FLOAT_BYTES * sum(t.numel() for t in weights.named().values()),
        seconds=history[-1].seconds,
        peak_memory_bytes=peak_device_memory_bytes(backbone.device) or peak_memory_bytes(),
        settings=shown_settings(config),
        history=tuple((one.epoch, one.train_loss, one.dev_score) for one in history),
        test_metrics=test.metrics,
        items=compare_items.items_of(
            test.predictions, splits["test"], task, read_examples(cell.paths.prepared, "test")
        ),
    )


def read_row(file: Path) -> Row:
    """Return the row that `train` wrote."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["history"] = tuple(tuple(one) for one in values["history"])
    values["items"] = Items(**values["items"])
    return Row(**values)


def shown_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that matter to a method, by the names of a search."""
    prompt = config.prompt
    length = {"prompt_length": prompt.length, "prompt_dropout": prompt.dropout}
    deep = {"prompt_layers": prompt.layers, "reparameterization": prompt.reparameterization}
    own: dict[Method, dict[str, Any]] = {
        "ptv2": {**length, **deep},
        "prompt_tuning": length,
    }
    shared = {"learning_rate": config.learning_rate, "epochs": config.epochs}
    return {**own.get(config.method, {}), **shared}


def begin(threads: int) -> None:
    """Make this process one of a comparison: so many threads, and an end when it ends."""
    torch.set_num_threads(threads)
    if multiprocessing.parent_process() is not None:
        end_with_parent()
