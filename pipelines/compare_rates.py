"""The work of a learning-rate window: trainings of one task and name, scored on dev alone.

One process does all rates of a seed, since loading takes longer than a short training. Each rate
is kept as it ends.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

from pipelines.compare_data import WindowRun
from pipelines.compare_jobs import Cell, begin, training_key
from pipelines.extra_settings import WindowSettings
from pipelines.paths import alone
from pipelines.prepared import Prepared
from pipelines.stages.training import backbone_for, overlay, start_training, trunk_cache
from ptv2_core.config import TrainConfig
from ptv2_core.errors import TrainingError
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.training.start import MAX_FINETUNING_RATE

HIGHEST_RATE = 1.0


def rates_of(cell: Cell, window: WindowSettings) -> tuple[float, ...]:
    """Return the rates, lowest first: evenly spaced in logs around the cell's own.

    Where the highest would be more than its method allows, all are moved down by one factor.
    """
    top = min(_centred_top(cell, window), _highest(cell))
    steps = range(1 - window.points, 1)
    found = (top * window.factor ** (step / (window.points - 1)) for step in steps)
    return tuple(float(f"{rate:.6g}") for rate in found)


def is_moved(cell: Cell, window: WindowSettings) -> bool:
    """Tell whether the rates are not around the cell's own, since that would pass what it may."""
    return _centred_top(cell, window) > _highest(cell)


def _centred_top(cell: Cell, window: WindowSettings) -> float:
    return cell.settings.train.learning_rate * math.sqrt(window.factor)


def _highest(cell: Cell) -> float:
    return MAX_FINETUNING_RATE if cell.settings.train.method == "finetune" else HIGHEST_RATE


def finished_runs(cell: Cell, window: WindowSettings, seed: int) -> tuple[WindowRun, ...] | None:
    """Return the runs of a seed at all rates; None where one has not been finished."""
    prepared = Prepared.load(cell.paths.prepared)
    files = [_file(cell, prepared, config) for config in _configs(cell, window, seed)]
    return tuple(map(_read, files)) if all(file.is_file() for file in files) else None


def train_all(cell: Cell, window: WindowSettings, seed: int, threads: int) -> tuple[WindowRun, ...]:
    """Train a cell at the rates at which it has not been trained, and return the runs at all.

    Raises:
        PTv2Error: As the stage `train`, but for a training that diverges; or another process does
            the same.
    """
    begin(threads)
    prepared = Prepared.load(cell.paths.prepared)
    runs = []
    with alone(_folder(cell) / f"{cell.name}-{seed}.lock", "window of this comparison"):
        # all at once: code that is edited while this process trains is not the code that trains
        files = [(one, _file(cell, prepared, one)) for one in _configs(cell, window, seed)]
        backbone = backbone_for(cell.settings, prepared)
        for config, file in files:
            if not file.is_file():
                write_json_atomic(file, asdict(_run(cell, prepared, backbone, config)))
            runs.append(_read(file))
    return tuple(runs)


def _configs(cell: Cell, window: WindowSettings, seed: int) -> list[TrainConfig]:
    return [
        overlay(cell.settings.train, {**window.train, "learning_rate": rate, "seed": seed})
        for rate in rates_of(cell, window)
    ]


def _run(cell: Cell, prepared: Prepared, backbone: Backbone, config: TrainConfig) -> WindowRun:
    _, reports = start_training(
        backbone, prepared, config, trunk=trunk_cache(cell.settings, cell.paths)
    )
    scores: list[float] = []
    is_diverged = False
    try:
        for report in reports:
            if report.evaluation is not None:
                scores.append(report.evaluation.score)
    except TrainingError:
        is_diverged = True
    return WindowRun(
        task=cell.settings.name,
        method=cell.name,
        seed=config.seed,
        learning_rate=config.learning_rate,
        dev=0.0 if is_diverged else max(scores),
        is_diverged=is_diverged,
    )


def _folder(cell: Cell) -> Path:
    return cell.folder / "windows"


def _file(cell: Cell, prepared: Prepared, config: TrainConfig) -> Path:
    """Return where a run is kept: its name changes with everything it depends on."""
    key = training_key(cell, prepared, config, [list(WindowRun.__dataclass_fields__)])
    return _folder(cell) / f"{cell.name}-{config.seed}-{key}.json"


def _read(file: Path) -> WindowRun:
    return WindowRun(**json.loads(file.read_text(encoding="utf-8")))
