"""`ptv2 compare`: tasks x methods x seeds on the same data, loop and number of search trials.

The jobs run in processes side by side. Each is kept as it ends, so that a comparison that was
stopped goes on, and one that is asked for more runs only that.
"""

import multiprocessing
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import compare_jobs
from pipelines.compare_data import Comparison, Row, TaskFacts, Trial
from pipelines.compare_json import to_json
from pipelines.compare_page import page
from pipelines.compare_report import markdown
from pipelines.compare_stats import Summary, summarise
from pipelines.dag import git_commit
from pipelines.errors import PipelineError
from pipelines.extra_settings import CompareSettings
from pipelines.paths import TaskPaths
from pipelines.settings import Settings
from pipelines.stages import Progress, silent
from pipelines.stages.lanes import deaf_to_interrupts
from pipelines.stages.prepare import Prepared
from pipelines.stages.training import backbone_for
from pipelines.threads import available_cores, chosen_threads
from ptv2_core.config import Method
from ptv2_core.data.examples import SPLITS
from ptv2_core.errors import PTv2Error
from ptv2_core.files import write_json_atomic, write_text_atomic

LIBRARIES = ("torch", "transformers", "optuna")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A finished comparison.

    Attributes:
        comparison: What was found.
        summary: Its statistics.
        folder: Where the report is: `compare.html`, `compare.md`, `compare.json`.
    """

    comparison: Comparison
    summary: Summary
    folder: Path


def run(
    settings: Settings,
    tasks: Sequence[str],
    compare: CompareSettings,
    progress: Progress = silent,
) -> Compared:
    """Run what has not been run, and write `results/compare`.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks whose data is prepared.
        compare: Methods, seeds and searches.
        progress: Told of each job that ends.

    Raises:
        PTv2Error: A job's settings or data are wrong, or its process is gone; all that ended
            before is kept.
    """
    cells = {
        (task, method): compare_jobs.cell_of(
            settings.task(task), TaskPaths(root=settings.root, task=task), compare, method
        )
        for task in tasks
        for method in compare.methods
    }
    for task in tasks:  # data that is missing is told before anything is trained
        Prepared.load(TaskPaths(root=settings.root, task=task).prepared)
    rows, trials = _run_jobs(cells, compare, progress)
    comparison = _comparison(settings, tasks, compare, rows, trials)
    summary = summarise(comparison)
    folder = settings.root / "results" / "compare"
    write(comparison, summary, folder)
    return Compared(comparison=comparison, summary=summary, folder=folder)


def write(comparison: Comparison, summary: Summary, folder: Path) -> None:
    """Write the report in its three forms."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "compare.html", page(comparison, summary))
    write_text_atomic(folder / "compare.md", markdown(comparison, summary))
    write_json_atomic(folder / "compare.json", to_json(comparison, summary))


def _run_jobs(
    cells: Mapping[tuple[str, Method], compare_jobs.Cell],
    compare: CompareSettings,
    progress: Progress,
) -> tuple[list[Row], list[Trial]]:
    """Search every cell, then train it with every seed; as many at once as `parallel`."""
    workers = min(compare.parallel, len(cells) * len(compare.seeds))
    threads = chosen_threads(workers)
    rows: list[Row] = []
    trials: list[Trial] = []
    total = len(cells) * (1 + len(compare.seeds))
    done = 0
    waiting = deque(cells.items())
    running: dict[Future[Any], tuple[str, compare_jobs.Cell]] = {}
    with _pool(workers) as submit:
        while waiting or running:
            # a cell's trainings come before the next search: what is stopped has whole cells
            while waiting and len(running) < workers:
                (task, method), cell = waiting.popleft()
                job = submit(compare_jobs.search, cell, threads)
                running[job] = (f"search {task} {method}", cell)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                what, cell = running.pop(future)
                result = _result(future, what)
                done += 1
                if isinstance(result, Row):
                    rows.append(result)
                    what += f": test {result.metric} {result.test:.4f}, {result.seconds:.0f} s"
                else:
                    trials += result.trials
                    for seed in compare.seeds:
                        name = f"{cell.settings.name} {cell.method}, seed {seed}"
                        job = submit(compare_jobs.train, cell, result.changes, seed, threads)
                        running[job] = (name, cell)
                progress(what, done, total)
    return rows, trials


def _result(future: Future[Any], what: str) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise PipelineError(
            f"{what}: its process ended by itself (most often too little memory: lower "
            "compare.parallel or train.token_budget); what ended before is kept, and the same "
            "command goes on"
        ) from error
    except PTv2Error as error:
        raise PipelineError(f"{what}: {error}") from error


@contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Future[Any]]]:
    """Yield what submits jobs to processes, each to a fresh one, so that its memory is its own."""
    # a process for each job; Ctrl-C reaches this process alone, which ends them
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with deaf_to_interrupts():
            return pool.submit(function, *arguments)

    try:
        yield submit
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()


def _comparison(
    settings: Settings,
    tasks: Sequence[str],
    compare: CompareSettings,
    rows: Sequence[Row],
    trials: Sequence[Trial],
) -> Comparison:
    prepared = {
        task: Prepared.load(TaskPaths(root=settings.root, task=task).prepared) for task in tasks
    }
    first = settings.task(tasks[0])
    backbone = backbone_for(first, prepared[tasks[0]], method="ptv2")
    return Comparison(
        methods=compare.methods,
        seeds=compare.seeds,
        tasks=tuple(_facts(settings, task, prepared[task]) for task in tasks),
        rows=tuple(rows),
        trials=tuple(trials),
        chosen_on="dev; test was scored once, after the choice",
        num_trials=dict.fromkeys(compare.methods, compare.n_trials),
        backbone=backbone.spec.name,
        backbone_parameters=backbone.spec.num_parameters,
        backbone_layers=backbone.spec.shape.num_layers,
        machine=_machine(backbone.device.type),
        date=datetime.now(tz=UTC).isoformat(timespec="seconds"),
        versions={name: version(name) for name in LIBRARIES},
        git_commit=git_commit(settings.root)["commit"],
        results="results/compare",
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
