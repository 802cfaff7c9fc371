"""What a trial of `ptv2 sweep` costs beyond its training: many tiny trials under Prefect."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna

from benchmarks.shapes import backbone_folder, bert_tokenizer
from pipelines.paths import TaskPaths
from pipelines.prefect_session import session
from pipelines.settings import load_settings
from pipelines.stages import fetch, prepare
from pipelines.sweep.flow import sweep_one
from pipelines.sweep.host import Trainer
from pipelines.sweep.job import Job
from pipelines.sweep.record import SweepRecord
from pipelines.threads import set_up_torch

TASK = "intents"
DEMO = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What so many workers gave.

    Attributes:
        engine: Where the trials trained, as `sweep.engine` has it.
        workers: Trials side by side.
        trials: That were timed.
        trials_per_minute: Of all workers.
        training_ms: A trial's training alone.
        overhead_ms: What a worker needs for a trial beyond that.
    """

    engine: str
    workers: int
    trials: int
    trials_per_minute: float
    training_ms: float
    overhead_ms: float


def measure(scratch: Path, *, engine: str, workers: tuple[int, ...], trials: int) -> list[Overhead]:
    """Sweep one tiny task with each number of workers, on one temporary Prefect server.

    A worker's first trial loads data and backbone and is not timed; what Prefect, the study's
    database and the pipes between the processes take is in the rest.

    Args:
        scratch: A new folder.
        engine: Where the trials train; Ray and Dask start a cluster on this machine.
        workers: Numbers of workers.
        trials: Of each sweep.
    """
    scratch.mkdir(parents=True)
    backbone = backbone_folder("tiny", scratch)
    bert_tokenizer().save_pretrained(backbone)
    files = {count: scratch / f"params-{count}.yaml" for count in workers}
    for count, file in files.items():
        params = _params(backbone, engine, count, trials=trials)
        file.write_text(json.dumps(params), encoding="utf-8")
    settings = load_settings(files[workers[0]]).task(TASK)
    paths = TaskPaths(root=scratch, task=TASK)
    fetch.run(settings, paths)
    prepare.run(settings, paths)
    with session(scratch):
        return [_measure(file, paths, engine, count) for count, file in files.items()]


def _params(backbone: Path, engine: str, workers: int, *, trials: int) -> dict[str, Any]:
    fetched = {"source": "demo", "path": str(DEMO / "intents.toml")}
    prepared = {
        "kind": "classification",
        "text": "text",
        "label": "label",
        "max_rows": {"train": 64, "dev": 32, "test": 16},
    }
    return {
        "backbone": {"name": str(backbone), "revision": None, "digest": None, "device": "cpu"},
        "prepare": {},
        # a seed of its own makes a study of its own
        "search": {"epochs": 1, "pruner": "none", "seed": workers},
        "train": {},
        "evaluate": {},
        "register": {},
        "sweep": {
            "engine": engine,
            "n_trials": trials,
            "workers": workers,
            "finalists": 1,
            "seeds": 1,
            "patience": None,
            "transfer": 0,
        },
        "tasks": {TASK: {"fetch": fetched, "prepare": prepared, "search": {}, "train": {}}},
    }


def _measure(file: Path, paths: TaskPaths, engine: str, workers: int) -> Overhead:
    settings = load_settings(file)
    record = sweep_one(settings, TASK, settings.sweep, lambda look: None)
    url = f"sqlite:///{paths.sweeps}"
    ends = [
        one.datetime_complete
        for one in optuna.load_study(study_name=record.study, storage=url).get_trials()
        if one.datetime_complete is not None
    ]
    each_s, timed = seconds_each(ends, workers)
    training_s = _alone(file, paths, record, workers)
    return Overhead(
        engine=engine,
        workers=workers,
        trials=timed,
        trials_per_minute=60 * workers / each_s,
        training_ms=1000 * training_s,
        overhead_ms=1000 * (each_s - training_s),
    )


def seconds_each(ends: list[datetime], workers: int) -> tuple[float, int]:
    """Return a worker's seconds for one trial and how many trials that is the mean of.

    Time counts from when each worker has ended one trial, if they share them evenly.

    Args:
        ends: When each trial ended, more of them than workers.
        workers: Side by side.
    """
    ends = sorted(ends)
    timed = len(ends) - workers
    seconds = (ends[-1] - ends[workers - 1]).total_seconds()
    return seconds * workers / timed, timed


def _alone(file: Path, paths: TaskPaths, record: SweepRecord, workers: int) -> float:
    """Return the seconds of a trial's training alone in this process, the mean of all trials."""
    set_up_torch(workers)
    trainer = Trainer(load_settings(file).task(TASK), paths.root)

    def once(params: Mapping[str, Any]) -> float:
        checkpoint = paths.root / "alone.safetensors"
        job = Job(
            params_file=str(file),
            root=str(paths.root),
            task=TASK,
            params=dict(params),
            checkpoint=str(checkpoint),
            workers=workers,
        )
        began = time.perf_counter()
        for _ in trainer.train(job):
            pass
        seconds = time.perf_counter() - began
        checkpoint.unlink(missing_ok=True)
        return seconds

    once(record.trials[0].params)  # to warm up
    return fmean(once(one.params) for one in record.trials)
