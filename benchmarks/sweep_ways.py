"""Ways to search settings for a task, trial after trial, and the curves they trained.

- `grid`: the released code's way (`search_script/search_copa_roberta.sh`): its recipe, its learning
  rates and prompt lengths in its own order, every cell trained to the end, one seed. That script
  also trains each cell anew for six numbers of epochs; here a cell is trained once.
- `tpe`: Optuna's TPE sampler as it comes, nothing pruned, over our space and settings.
- `ours`: the engine of `ptv2 sweep`: the settings of `train` first, pruner, patience.
- `engine`: the same engine with the grid's recipe within the grid's ranges, which tells what of the
  gain is the engine's and what the settings'.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

import ptv2_core
from benchmarks.epochs import best, spent_until
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.schema import nested
from pipelines.settings import TaskSettings, load_settings
from pipelines.stages import fetch, prepare
from pipelines.stages.lanes import trial_config
from pipelines.stages.training import backbone_for, backbone_identity, overlay, start_training
from pipelines.study import suggest
from pipelines.sweep.supervise import Ended
from pipelines.sweep.sweeping import Done, opened, overlaid
from pipelines.sweep.training import Order
from ptv2_core.config import TrainConfig
from ptv2_core.files import source_digest, write_json_atomic

BACKBONE = "all-minilm-l6-v2"
GRID, TPE, OURS, ENGINE = "grid", "tpe", "ours", "engine"
RECIPE: Mapping[str, Any] = {
    "prompt": {"start": "normal", "start_attention": None, "dropout": 0.1},
    "head": {"dropout": 0.1},
    "head_learning_rate": None,
    "warmup_fraction": 0.0,
    "weight_decay": 0.0,
    # no early stopping
    "patience": 100_000,
}
FILES: Mapping[str, Mapping[str, str]] = {
    "rte": {"train": "train.jsonl", "test": "validation.jsonl"},
    "snips": {"train": "train.jsonl", "dev": "validation.jsonl", "test": "test.jsonl"},
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is searched on one task.

    Attributes:
        task: Its name.
        data: A key of `FILES`.
        prepare: The section of params.yaml, `max_rows` included.
        chance: What guessing scores.
        epochs: Of a trial.
        rates: Learning rates of the grid, in its order.
        lengths: Prompt lengths of the grid, in its order.
        n_trials: Of the other ways, at most.
        seeds: Of their samplers; the trainings have one seed, that of `train`.
        engines: Which of `ours` and `engine` to run beside the grid and TPE.
    """

    task: str
    data: str
    prepare: Mapping[str, Any]
    chance: float
    epochs: int
    rates: tuple[float, ...]
    lengths: tuple[int, ...]
    n_trials: int
    seeds: tuple[int, ...]
    engines: tuple[str, ...]


Curves = list[list[float]]
"""The trials of one search in order, each its scores."""


class Table:
    """Learning curves on disk: what was trained once is read, for training is deterministic."""

    def __init__(self, folder: Path, settings: TaskSettings, root: Path) -> None:
        """Load data and backbone.

        Args:
            folder: Of the curves; may hold those of an earlier run.
            settings: Of the task.
            root: The workspace; the task is prepared.
        """
        self._folder = folder
        self._prepared = Prepared.load(TaskPaths(root=root, task=settings.name).prepared)
        self._backbone = backbone_for(settings, self._prepared)
        self._identity = [
            self._prepared.identity(),
            list(backbone_identity(settings)),
            source_digest(Path(ptv2_core.__file__).parent),
        ]
        self.trained = 0

    def scores(self, config: TrainConfig) -> Iterator[float]:
        """Yield the score of each epoch; what is not known yet is trained."""
        text = json.dumps([self._identity, config.to_mapping()], sort_keys=True)
        file = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        found: dict[str, Any] = (
            json.loads(file.read_text(encoding="utf-8"))
            if file.is_file()
            else {"scores": [], "is_whole": False}
        )
        known: list[float] = found["scores"]
        yield from list(known)
        if found["is_whole"]:
            return
        _, reports = start_training(self._backbone, self._prepared, config)
        evaluations = (one.evaluation for one in reports if one.evaluation is not None)
        for place, evaluation in enumerate(evaluations):
            self.trained += 1
            if place >= len(known):
                known.append(evaluation.score)
                write_json_atomic(file, found)
                yield evaluation.score
        write_json_atomic(file, {**found, "is_whole": True})


class _Reached(Exception):
    """The target was reached, and the rest of a search would be of no use."""


def make_workspace(root: Path, data: Path, plan: Plan) -> None:
    """Write the settings of each way, and fetch and prepare the task.

    Args:
        root: A new folder.
        data: Of the benchmark data sets, read in place.
        plan: What is searched.
    """
    root.mkdir(parents=True)
    for way in (TPE, OURS, ENGINE):
        for seed in plan.seeds:
            file = params_file(root, way, seed)
            file.write_text(json.dumps(_params(data, plan, way, seed)), encoding="utf-8")
    settings = load_settings(params_file(root, OURS, plan.seeds[0])).task(plan.task)
    paths = TaskPaths(root=root, task=plan.task)
    fetch.run(settings, paths)
    prepare.run(settings, paths)


def params_file(root: Path, way: str, seed: int) -> Path:
    """Return the file with the settings of a way."""
    return root / f"{way}-{seed}.yaml"


def _params(data: Path, plan: Plan, way: str, seed: int) -> dict[str, Any]:
    search: dict[str, Any] = {"epochs": plan.epochs, "seed": seed}
    train: dict[str, Any] = {}
    if way == ENGINE:
        search["space"] = {
            "learning_rate": [min(plan.rates), max(plan.rates)],
            "prompt_length": [min(plan.lengths), max(plan.lengths)],
        }
        # what is tried first is the middle of the grid
        middle = {"length": plan.lengths[len(plan.lengths) // 2]}
        rate = plan.rates[len(plan.rates) // 2]
        train = {**RECIPE, "learning_rate": rate, "prompt": {**RECIPE["prompt"], **middle}}
    fetched = {"source": "local", "path": str(data / plan.data), "files": FILES[plan.data]}
    return {
        "backbone": {"name": BACKBONE, "revision": None, "digest": None},
        "prepare": {},
        "search": search,
        "train": train,
        "evaluate": {},
        "register": {},
        # finalists' further seeds are no part of the search; grid and TPE have none
        "sweep": {"n_trials": plan.n_trials, "workers": 1, "finalists": 1, "seeds": 1},
        "tasks": {
            plan.task: {"fetch": fetched, "prepare": plan.prepare, "search": {}, "train": {}}
        },
    }


def run_grid(settings: TaskSettings, plan: Plan, table: Table) -> Curves:
    """Train every cell to the end, the learning rate in the outer loop as in the script."""
    curves = []
    for rate in plan.rates:
        for length in plan.lengths:
            prompt = {**RECIPE["prompt"], "length": length}
            cell = {**RECIPE, "prompt": prompt, "learning_rate": rate, "epochs": plan.epochs}
            curves.append(list(table.scores(overlay(settings.train, cell))))
    return curves


def run_tpe(settings: TaskSettings, plan: Plan, table: Table) -> Curves:
    """Let TPE draw its trials, and train each to the end."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=settings.search.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    curves: Curves = []
    while len(curves) < plan.n_trials:
        trial = study.ask()
        changes: dict[str, Any] = nested(suggest(trial, settings.search.space))
        config = overlay(trial_config(settings, changes), {"patience": RECIPE["patience"]})
        curves.append(list(table.scores(config)))
        study.tell(trial, best(curves[-1:]))
    return curves


def run_engine(root: Path, plan: Plan, table: Table, target: float, way: str, seed: int) -> Curves:
    """Sweep as `ptv2 sweep` does with one worker, until a trial reached the target or it is over.

    The trials are trained here and not by a process of their own, so that the table is used; what
    is drawn, given up and tried first is decided by the engine.
    """
    settings = load_settings(params_file(root, way, seed))
    chosen = settings.task(plan.task)
    curves: Curves = []
    with opened(settings, plan.task, overlaid(settings.sweep, {})) as sweep:

        def submit(name: str, order: Order, done: Done) -> None:
            number = order.number
            curves.append([])
            state: Any = "complete"
            scores = table.scores(trial_config(chosen, nested(order.job.params)))
            for epoch, score in enumerate(scores, start=1):
                curves[-1].append(score)
                if spent_until(curves, target) is not None:
                    raise _Reached
                if sweep.study.report(number, epoch, score):
                    state = "pruned"
                    break
            sweep.study.tell(number, Ended(state=state, seconds=0.0, retries=0, message=""))
            done()

        try:
            sweep.run(submit, lambda look: None)
        except _Reached:
            return curves
    return curves
