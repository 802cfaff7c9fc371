"""`python -m benchmarks.sweep`: what a search costs, in epochs, until the same dev score.

Searches settings for SNIPS slots and RTE with MiniLM in the released code's way (its full grid,
every cell trained to the end, one seed), with plain TPE, and with the engine of `ptv2 sweep`; the
data, epochs per trial and training seed are the same. The scores to reach are each peer's own
best, and half a point below the grid's. Learning curves are kept on disk while it runs, so that a
training that two ways ask for is done once; its epochs count for both. A task on which the grid's
best is what guessing gives has its figures shown and is in no ratio. Then many tiny trials are
swept under a Prefect server, for the overhead of one. Ways run side by side, a thread each.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import inf, sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import sweep_overhead
from benchmarks.data import data_folder
from benchmarks.epochs import Ratio, best, overall, ratio, spent, spent_until
from benchmarks.machine import describe, set_up
from benchmarks.sweep_overhead import Overhead
from benchmarks.sweep_report import drawn
from benchmarks.sweep_ways import (
    ENGINE,
    GRID,
    OURS,
    TPE,
    Curves,
    Plan,
    Table,
    make_workspace,
    params_file,
    run_engine,
    run_grid,
    run_tpe,
)
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import load_settings
from pipelines.threads import available_cores
from ptv2_core.files import write_json_atomic

Searching = Future[tuple[Curves, int]]

HALF_POINT = 0.005
BEST, BELOW, TPE_BEST = "best", "half_point_below", "tpe_best"
WORKERS = (1, 2)
TABLE_WIDTH = 125
SLOTS = {"kind": "tagging", "tokens": "tokens", "tags": "tags"}
PAIRS = {"kind": "classification", "text": "premise", "text_pair": "hypothesis", "label": "label"}
# learning rates and lengths of the released search script
RATES = (5e-3, 7e-3, 1e-2)
LENGTHS = (4, 8, 16, 32, 64, 128)
# standard errors above guessing: the best of 72 guesses is some 2.4 above their mean
LUCK = 3.0


def plans(*, quick: bool) -> list[Plan]:
    """Return what is searched: in full as docs/optimisation.md cuts the data, or a small part.

    Args:
        quick: Few rows, trials and epochs. The grid is that of the released script all the same.
    """
    slots: dict[str, int] = {"train": 1000, "dev": 250} if quick else {"train": 1500}
    pairs: dict[str, int] = {"train": 50, "dev": 100} if quick else {"train": 1200}
    return [
        Plan(
            task=task,
            data=data,
            prepare={**section, "max_rows": {**rows, "test": 10}},
            chance=chance,
            epochs=4 if quick else 6,
            rates=RATES,
            lengths=LENGTHS,
            n_trials=6 if quick else 24,
            seeds=(42,) if quick else (42, 43, 44),
            engines=(OURS,) if quick else (OURS, ENGINE),
        )
        for task, data, section, rows, chance in (
            ("slots", "snips", SLOTS, slots, 0.0),
            ("rte", "rte", PAIRS, pairs, 0.5),
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the ways needed on one task.

    Attributes:
        plan: What was searched.
        dev_rows: Rows that scores are of.
        grid: The grid's curves.
        others: Those of the other ways, by way; a search for each seed.
        trained: Epochs that were trained for all of it.
    """

    plan: Plan
    dev_rows: int
    grid: Curves
    others: Mapping[str, list[Curves]]
    trained: int

    @property
    def is_learned(self) -> bool:
        """Whether the grid's best is more than the luck of so many guesses."""
        chance = self.plan.chance
        error = sqrt(chance * (1 - chance) / self.dev_rows)
        return best(self.grid) > chance + LUCK * error

    @property
    def targets(self) -> dict[str, list[float]]:
        """Scores to reach by name, one for each seed of the samplers."""
        top = best(self.grid)
        return {
            BEST: [top] * len(self.plan.seeds),
            BELOW: [top - HALF_POINT] * len(self.plan.seeds),
            TPE_BEST: [best(curves) for curves in self.others[TPE]],
        }

    def searches(self, way: str) -> list[Curves]:
        """Return a way's searches, a seed each; the grid has none, and counts for all seeds."""
        return [self.grid] * len(self.plan.seeds) if way == GRID else self.others[way]

    def against(self, peer: str, target: str) -> Ratio:
        """Compare ours with a peer, by the name of a target."""
        return ratio(self.searches(peer), self.searches(OURS), self.targets[target])


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search, as a process is told to do it.

    Attributes:
        plan: What is searched.
        root: The workspace; the task is prepared.
        curves: Where learning curves are kept.
        way: How.
        seed: Of the sampler; the grid has none.
        target: The score at which an engine stops.
    """

    plan: Plan
    root: Path
    curves: Path
    way: str
    seed: int
    target: float = inf

    def run(self) -> tuple[Curves, int]:
        """Return the curves of its trials, and how many epochs were trained for them."""
        set_up(threads=1)
        way = OURS if self.way == GRID else self.way
        settings = load_settings(params_file(self.root, way, self.seed)).task(self.plan.task)
        folder = self.curves / self.plan.task
        folder.mkdir(parents=True, exist_ok=True)
        table = Table(folder, settings, self.root)
        if self.way == GRID:
            found = run_grid(settings, self.plan, table)
        elif self.way == TPE:
            found = run_tpe(settings, self.plan, table)
        else:
            found = run_engine(self.root, self.plan, table, self.target, self.way, self.seed)
        return found, table.trained


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, trials, epochs; minutes")
    parser.add_argument(
        "--task",
        action="append",
        choices=[plan.task for plan in plans(quick=True)],
        help="search this task only; may be repeated",
    )
    parser.add_argument(
        "--engine",
        default="processes",
        choices=["processes", "ray", "dask"],
        help="measure the overhead on this engine; default: %(default)s",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    parser.add_argument(
        "--curves",
        type=Path,
        metavar="FOLDER",
        help="keep the learning curves, so that a run that was stopped goes on",
    )
    given = parser.parse_args(words)
    set_up(threads=1)
    console = Console(width=TABLE_WIDTH)
    data = data_folder()
    chosen = [
        plan for plan in plans(quick=given.quick) if given.task is None or plan.task in given.task
    ]
    missing = sorted(plan.data for plan in chosen if not (data / plan.data).is_dir())
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if missing:
            console.print(
                f"no epochs are counted: {', '.join(missing)} not found in {data}; set "
                "PTV2_BENCH_DATA to the folder of the benchmark data sets",
                soft_wrap=True,
            )
            found: list[Found] = []
        else:
            curves = given.curves or scratch / "curves"
            found = _side_by_side(chosen, scratch, curves.resolve(), data.resolve())
        overheads = sweep_overhead.measure(
            scratch / "overhead",
            engine=given.engine,
            workers=WORKERS,
            trials=40 if given.quick else 60,
        )
    figures = mapping(found, overheads)
    console.print(drawn(figures))
    if given.json is not None:
        write_json_atomic(given.json, figures)


def _side_by_side(chosen: Sequence[Plan], scratch: Path, curves: Path, data: Path) -> list[Found]:
    """Search the tasks, a process for each search, as many at a time as there are cores."""
    with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
        roots = {plan.task: scratch / plan.task for plan in chosen}
        for made in [pool.submit(make_workspace, roots[one.task], data, one) for one in chosen]:
            made.result()

        def submit(plan: Plan, way: str, seed: int, target: float = inf) -> Searching:
            search = Search(
                plan=plan,
                root=roots[plan.task],
                curves=curves,
                way=way,
                seed=seed,
                target=target,
            )
            return pool.submit(search.run)

        grids = {plan.task: submit(plan, GRID, plan.seeds[0]) for plan in chosen}
        tpes = {plan.task: [submit(plan, TPE, seed) for seed in plan.seeds] for plan in chosen}
        engines: dict[str, dict[str, list[Searching]]] = {}
        for plan in chosen:
            top = best(grids[plan.task].result()[0])
            tops = [max(top, best(one.result()[0])) for one in tpes[plan.task]]
            engines[plan.task] = {
                way: [
                    submit(plan, way, seed, top if way == ENGINE else tops[place])
                    for place, seed in enumerate(plan.seeds)
                ]
                for way in plan.engines
            }
        return [
            _found(
                plan,
                roots[plan.task],
                grids[plan.task].result(),
                {
                    way: [one.result() for one in searching]
                    for way, searching in {TPE: tpes[plan.task], **engines[plan.task]}.items()
                },
            )
            for plan in chosen
        ]


def _found(
    plan: Plan,
    root: Path,
    grid: tuple[Curves, int],
    others: Mapping[str, list[tuple[Curves, int]]],
) -> Found:
    prepared = Prepared.load(TaskPaths(root=root, task=plan.task).prepared)
    return Found(
        plan=plan,
        dev_rows=len(prepared.splits["dev"]),
        grid=grid[0],
        others={way: [curves for curves, _ in searches] for way, searches in others.items()},
        trained=grid[1] + sum(trained for found in others.values() for _, trained in found),
    )


def mapping(found: Sequence[Found], overheads: Sequence[Overhead]) -> dict[str, Any]:
    """Return the figures as the JSON has them.

    A ratio is the geometric mean over the tasks that were learned, and null where there is none
    or ours did not reach the score on one of them. The overhead is the largest over the numbers
    of workers.
    """
    learned = [one for one in found if one.is_learned]

    def mean(peer: str, target: str) -> float | None:
        return overall([one.against(peer, target) for one in learned])

    return {
        "ratios": {
            "epochs_vs_grid": mean(GRID, BEST),
            "epochs_vs_tpe": mean(TPE, TPE_BEST),
            "half_point_below_vs_grid": mean(GRID, BELOW),
            "grids_best_vs_tpe": mean(TPE, BEST),
        },
        "tasks_in_ratios": [one.plan.task for one in learned],
        "overhead_ms_per_trial": max(one.overhead_ms for one in overheads),
        "overheads": [asdict(one) for one in overheads],
        "machine": describe(),
        "tasks": [_task(one) for one in found],
    }


def _task(found: Found) -> dict[str, Any]:
    ways = (GRID, *found.others)
    return {
        "plan": asdict(found.plan),
        "dev_rows": found.dev_rows,
        "is_learned": found.is_learned,
        "trained_epochs": found.trained,
        "targets": found.targets,
        "ratios": {
            target: {peer: asdict(found.against(peer, target)) for peer in ways if peer != OURS}
            for target in found.targets
        },
        "ways": {way: _searches(found, way) for way in ways},
    }


def _searches(found: Found, way: str) -> list[dict[str, Any]]:
    """Return what each search of a way needed, and its curves."""
    return [
        {
            "epochs_until": {
                name: spent_until(curves, values[seed]) for name, values in found.targets.items()
            },
            "epochs": spent(curves),
            "best": best(curves),
            "curves": curves,
        }
        for seed, curves in enumerate(found.searches(way))
    ]


if __name__ == "__main__":
    main()
