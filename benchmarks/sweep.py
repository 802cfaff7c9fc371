"""`python -m benchmarks.sweep`: what a search costs, in epochs, until the same dev score.

Searches settings for SNIPS slots and RTE with MiniLM in the released code's way (a full grid, every
cell trained to the end, one seed), with plain TPE, and with the engine of `ptv2 sweep`; the data,
epochs per trial and training seed are the same. The scores to reach are the best of the grid, half
a point below it, and the best that TPE found in all its trials. Learning curves are kept on disk
while it runs, so that a training that two ways ask for is done once; its epochs count for both.
Then many tiny trials are swept under a Prefect server, for the overhead of one. The tasks run side
by side, a thread each.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
from pipelines.settings import load_settings
from ptv2_core.files import write_json_atomic

HALF_POINT = 0.005
BEST, BELOW, TPE_BEST = "best", "half_point_below", "tpe_best"
WORKERS = (1, 2)
TABLE_WIDTH = 125
SLOTS = {"kind": "tagging", "tokens": "tokens", "tags": "tags"}
PAIRS = {"kind": "classification", "text": "premise", "text_pair": "hypothesis", "label": "label"}
# learning rates and lengths of the released search script
RATES = (5e-3, 7e-3, 1e-2)
LENGTHS = (4, 8, 16, 32, 64, 128)


def plans(*, quick: bool, whole_grid: bool = False) -> list[Plan]:
    """Return what is searched: in full as docs/optimisation.md cuts the data, or a small part.

    Args:
        quick: Few rows, cells, trials and epochs.
        whole_grid: All of the released script's cells, when quick too.
    """
    few_cells = quick and not whole_grid
    rows = {"slots": 1000 if quick else 1500, "rte": 400 if quick else 1200}
    sections = {"slots": ("snips", SLOTS), "rte": ("rte", PAIRS)}
    return [
        Plan(
            task=task,
            data=data,
            prepare={**section, "max_rows": {"train": rows[task], "test": 10}},
            epochs=4 if quick else 6,
            rates=(5e-3, 1e-2) if few_cells else RATES,
            lengths=(8, 32, 128) if few_cells else LENGTHS,
            n_trials=8 if quick else 24,
            seeds=(42,) if quick else (42, 43, 44),
            engines=(OURS,) if quick else (OURS, ENGINE),
        )
        for task, (data, section) in sections.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the ways needed on one task.

    Attributes:
        plan: What was searched.
        grid: The grid's curves.
        others: Those of the other ways, by way; a search for each seed.
        trained: Epochs that were trained for all of it.
    """

    plan: Plan
    grid: Curves
    others: Mapping[str, list[Curves]]
    trained: int

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


def search(plan: Plan, scratch: Path, curves: Path, data: Path) -> Found:
    """Search one task in every way.

    Args:
        plan: What to search.
        scratch: A folder for the workspace.
        curves: Where learning curves are kept.
        data: The benchmark data sets.
    """
    set_up(threads=1)
    root = scratch / plan.task
    make_workspace(root, data, plan)
    settings = load_settings(params_file(root, OURS, plan.seeds[0])).task(plan.task)
    folder = curves / plan.task
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(folder, settings, root)
    grid = run_grid(settings, plan, table)
    others: dict[str, list[Curves]] = {way: [] for way in (TPE, *plan.engines)}
    for seed in plan.seeds:
        own = load_settings(params_file(root, TPE, seed)).task(plan.task)
        tpe = run_tpe(own, plan, table)
        others[TPE].append(tpe)
        for way in plan.engines:
            target = best(grid) if way == ENGINE else max(best(grid), best(tpe))
            others[way].append(run_engine(root, plan, table, target, way, seed))
    return Found(plan=plan, grid=grid, others=others, trained=table.trained)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, cells and trials; minutes")
    parser.add_argument(
        "--whole-grid", action="store_true", help="the released script's 18 cells, if --quick too"
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=[plan.task for plan in plans(quick=True)],
        help="search this task only; may be repeated",
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
        plan
        for plan in plans(quick=given.quick, whole_grid=given.whole_grid)
        if given.task is None or plan.task in given.task
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
            scratch / "overhead", workers=WORKERS, trials=16 if given.quick else 60
        )
    figures = mapping(found, overheads)
    console.print(drawn(figures))
    if given.json is not None:
        write_json_atomic(given.json, figures)


def _side_by_side(chosen: Sequence[Plan], scratch: Path, curves: Path, data: Path) -> list[Found]:
    """Search the tasks, a process each."""
    with ProcessPoolExecutor(len(chosen), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(search, plan, scratch, curves, data) for plan in chosen]
        return [one.result() for one in running]


def mapping(found: Sequence[Found], overheads: Sequence[Overhead]) -> dict[str, Any]:
    """Return the figures as the JSON has them.

    A ratio is the geometric mean over the tasks, and null where ours did not reach the score on one
    of them. The overhead is the largest over the numbers of workers.
    """

    def mean(peer: str, target: str) -> float | None:
        return overall([one.against(peer, target) for one in found])

    return {
        "ratios": {
            "epochs_vs_grid": mean(GRID, BEST),
            "epochs_vs_tpe": mean(TPE, BEST),
            "half_point_below_vs_grid": mean(GRID, BELOW),
            "half_point_below_vs_tpe": mean(TPE, BELOW),
            "tpe_best_vs_tpe": mean(TPE, TPE_BEST),
        },
        "overhead_ms_per_trial": max(one.overhead_ms for one in overheads),
        "overheads": [asdict(one) for one in overheads],
        "machine": describe(),
        "tasks": [_task(one) for one in found],
    }


def _task(found: Found) -> dict[str, Any]:
    ways = (GRID, *found.others)
    return {
        "plan": asdict(found.plan),
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
