"""`ptv2 compare`: tasks x names x seeds on the same data, loop and number of search trials.

The jobs run in processes side by side. Each is kept as it ends, so that a comparison that was
stopped goes on, and one that is asked for more runs only that.
"""

import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import compare_jobs, compare_rates
from pipelines.compare_data import (
    Comparison,
    Row,
    TaskFacts,
    Trial,
    Variant,
    Window,
    WindowRun,
)
from pipelines.compare_jobs import Cell
from pipelines.compare_json import to_json
from pipelines.compare_page import page
from pipelines.compare_report import markdown
from pipelines.compare_stats import Summary, summarise
from pipelines.dag import git_commit
from pipelines.errors import PipelineError
from pipelines.extra_settings import METHODS, CompareSettings
from pipelines.jobs import Submit, side_by_side
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import Settings
from pipelines.stages import Progress, silent
from pipelines.stages.training import backbone_for, backbone_identity
from pipelines.threads import available_cores, chosen_threads
from ptv2_core.data.examples import SPLITS
from ptv2_core.errors import PTv2Error, TrainingError
from ptv2_core.files import write_json_atomic, write_text_atomic

LIBRARIES = ("torch", "transformers", "optuna")
Cells = Mapping[tuple[str, str], Cell]
"""By task and name."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A finished comparison.

    Attributes:
        comparison: What was found.
        summary: Its statistics.
        folder: Where the report is: `compare.html`, `compare.md`, `compare.json`.
        failed: Trainings that could not go on, each with why; the report lacks their rows.
    """

    comparison: Comparison
    summary: Summary
    folder: Path
    failed: tuple[str, ...] = ()


def run(
    settings: Settings,
    tasks: Sequence[str],
    compare: CompareSettings,
    progress: Progress = silent,
) -> Compared:
    """Run what has not been run, and write `results/compare`.

    A training that cannot go on, such as one whose loss is not finite, ends itself alone: it would
    fail again each time, and the others say something without it.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks whose data is prepared.
        compare: Names, seeds, searches and the window.
        progress: Told of each job that ends.

    Raises:
        PTv2Error: A job's settings or data are wrong, or its process is gone; all that ended
            before is kept.
    """
    identity = backbone_identity(settings.task(tasks[0]))  # all tasks have the same
    cells = {
        (task, name): compare_jobs.cell_of(
            settings.task(task), TaskPaths(root=settings.root, task=task), compare, name, identity
        )
        for task in tasks
        for name in compare.names
    }
    for task in tasks:  # data that is missing is told before anything is trained
        Prepared.load(TaskPaths(root=settings.root, task=task).prepared)
    work = _run_jobs(cells, compare, progress)
    comparison = _comparison(settings, tasks, compare, cells, work)
    summary = summarise(comparison)
    folder = settings.root / "results" / "compare"
    write(comparison, summary, folder)
    return Compared(
        comparison=comparison, summary=summary, folder=folder, failed=tuple(work.failed)
    )


def write(comparison: Comparison, summary: Summary, folder: Path) -> None:
    """Write the report in its three forms."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "compare.html", page(comparison, summary))
    write_text_atomic(folder / "compare.md", markdown(comparison, summary))
    write_json_atomic(folder / "compare.json", to_json(comparison, summary))


class _Work:
    """The jobs of a comparison: what is done, what runs, what waits."""

    def __init__(
        self, compare: CompareSettings, submit: Submit, threads: int, progress: Progress, total: int
    ) -> None:
        self.rows: list[Row] = []
        self.trials: list[Trial] = []
        self.window_runs: list[WindowRun] = []
        self.failed: list[str] = []
        self.running: dict[Future[Any], tuple[str, Callable[[Any], None]]] = {}
        self._compare, self._submit, self._threads = compare, submit, threads
        self._progress, self._done, self._total = progress, 0, total

    def open(self, cell: Cell) -> None:
        """Begin a cell with its search, or with its trainings where it has been searched."""
        found = compare_jobs.finished_search(cell)
        if found is not None:
            self._searched(cell, found)
            return
        what = f"search {cell.settings.name} {cell.name}"
        self._start(what, partial(self._searched, cell), compare_jobs.search, cell)

    def open_window(self, cell: Cell, seed: int) -> None:
        """Train a cell at all rates of the window."""
        window = self._compare.window
        assert window is not None, "it has cells"
        what = f"window of {cell.settings.name} {cell.name}, seed {seed}"
        runs = compare_rates.finished_runs(cell, window, seed)
        if runs is not None:
            self._swept(what, runs)
            return
        self._start(what, partial(self._swept, what), compare_rates.train_all, cell, window, seed)

    def take(self, future: Future[Any]) -> None:
        """Take what a job found, and start what needs it."""
        what, on_result = self.running.pop(future)
        try:
            result = future.result()
        except TrainingError as error:
            self.failed.append(f"{what}: {error}")
            self._tell(f"{what} failed")
            return
        except PTv2Error as error:
            raise PipelineError(f"{what}: {error}") from error
        on_result(result)

    def _start(
        self, what: str, on_result: Callable[[Any], None], job: Callable[..., Any], *arguments: Any
    ) -> None:
        self.running[self._submit(job, *arguments, self._threads)] = (what, on_result)

    def _searched(self, cell: Cell, found: compare_jobs.Found) -> None:
        self.trials += found.trials
        self._tell(f"{cell.settings.name} {cell.name} searched")
        for seed in self._compare.seeds:
            row = compare_jobs.finished_row(cell, found.changes, seed)
            if row is not None:
                self._trained(row)
                continue
            what = f"{cell.settings.name} {cell.name}, seed {seed}"
            self._start(what, self._trained, compare_jobs.train, cell, found.changes, seed)

    def _trained(self, row: Row) -> None:
        self.rows.append(row)
        self._tell(
            f"{row.task} {row.method}, seed {row.seed}: test {row.metric} {row.test:.4f}, "
            f"{row.seconds:.0f} s"
        )

    def _swept(self, what: str, runs: Sequence[WindowRun]) -> None:
        self.window_runs += runs
        best = max(runs, key=lambda run: run.dev)
        self._tell(f"{what}: best dev {best.dev:.4f} at {best.learning_rate:.3g}")

    def _tell(self, what: str) -> None:
        self._done += 1
        self._progress(what, self._done, self._total)


def _run_jobs(cells: Cells, compare: CompareSettings, progress: Progress) -> _Work:
    """Search each cell and train it with each seed, then the window; `parallel` jobs at once."""
    compared = [cell for cell in cells.values() if cell.name in compare.methods]
    window = compare.window
    swept = [cell for cell in cells.values() if window and cell.name in window.methods]
    sweeps = [(cell, seed) for cell in swept for seed in (window.seeds if window else ())]
    workers = min(compare.parallel, len(compared) * len(compare.seeds) + len(sweeps))
    threads = chosen_threads(workers)
    with side_by_side(workers) as submit:
        total = len(compared) * (1 + len(compare.seeds)) + len(sweeps)
        work = _Work(compare, submit, threads, progress, total)
        waiting = deque(
            [partial(work.open, cell) for cell in compared]
            + [partial(work.open_window, *sweep) for sweep in sweeps]
        )
        while waiting or work.running:
            # a cell's trainings come before the next search: what is stopped has whole cells
            while waiting and len(work.running) < workers:
                waiting.popleft()()
            if work.running:
                for future in wait(work.running, return_when=FIRST_COMPLETED).done:
                    work.take(future)
    return work


def _comparison(
    settings: Settings,
    tasks: Sequence[str],
    compare: CompareSettings,
    cells: Cells,
    work: _Work,
) -> Comparison:
    prepared = {
        task: Prepared.load(TaskPaths(root=settings.root, task=task).prepared) for task in tasks
    }

    def place(found: Row | Trial) -> tuple[int, int]:
        """Jobs end in any order; a report has its own."""
        return tasks.index(found.task), compare.methods.index(found.method)

    first = settings.task(tasks[0])
    backbone = backbone_for(first, prepared[tasks[0]], method="ptv2")
    return Comparison(
        methods=compare.methods,
        seeds=compare.seeds,
        tasks=tuple(_facts(settings, task, prepared[task]) for task in tasks),
        rows=tuple(sorted(work.rows, key=lambda row: (*place(row), row.seed))),
        trials=tuple(sorted(work.trials, key=lambda trial: (*place(trial), trial.number))),
        chosen_on="dev; test was scored once, after the choice",
        num_trials={name: compare.trials_of(name) for name in compare.methods},
        backbone=backbone.spec.name,
        backbone_parameters=backbone.spec.num_parameters,
        backbone_layers=backbone.spec.shape.num_layers,
        machine=_machine(backbone.device.type),
        date=datetime.now(tz=UTC).isoformat(timespec="seconds"),
        versions={name: version(name) for name in LIBRARIES},
        git_commit=git_commit(settings.root)["commit"],
        results="results/compare",
        variants=tuple(
            Variant(name=name, method=compare.method_of(name), changes=compare.changes_of(name))
            for name in compare.names
            if name not in METHODS
        ),
        window=_window(tasks, compare, cells, work.window_runs),
    )


def _window(
    tasks: Sequence[str], compare: CompareSettings, cells: Cells, runs: Sequence[WindowRun]
) -> Window | None:
    chosen = compare.window
    if chosen is None:
        return None
    places = [(task, name) for task in tasks for name in chosen.methods]
    return Window(
        methods=chosen.methods,
        factor=chosen.factor,
        points=chosen.points,
        seeds=chosen.seeds,
        train=chosen.train,
        moved=tuple(place for place in places if compare_rates.is_moved(cells[place], chosen)),
        runs=tuple(
            sorted(
                runs,
                key=lambda run: (
                    places.index((run.task, run.method)),
                    chosen.seeds.index(run.seed),
                    run.learning_rate,
                ),
            )
        ),
    )


def _facts(settings: Settings, task: str, prepared: Prepared) -> TaskFacts:
    own = settings.task(task).prepare
    limits = {split: own.rows_of(split) for split in SPLITS}
    cuts = [f"{split} to {most}" for split, most in limits.items() if most is not None]
    cut = f"{', '.join(cuts)} rows at most, drawn by seed {own.seed}" if cuts else ""
    rows = {split: prepared.splits[split].num_groups for split in SPLITS}
    return TaskFacts(
        name=task, kind=prepared.task.kind, metric=prepared.task.metric, cut=cut, **rows
    )


def _machine(device: str) -> str:
    python = f"Python {platform.python_version()}"
    return f"{available_cores()} cores {platform.machine()}, {device}, {python}"
