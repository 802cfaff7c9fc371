"""`ptv2 sweep`: start the flow, draw a table that lives, and say what was found and where it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.paths import TaskPaths
from pipelines.settings import Settings, load_settings
from pipelines.study_files import PAGE
from pipelines.study_report import finalists_table
from pipelines.sweep import flow
from pipelines.sweep.looks import Look, OnLook
from pipelines.sweep.record import TrialRecord, in_words

SHOWN_BEST = 5


def run(
    settings: Settings,
    tasks: list[str],
    *,
    trials: int | None,
    workers: int | None,
    console: Console,
) -> None:
    """Sweep tasks, draw how they stand, and print the winners.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks.
        trials: In place of `sweep.n_trials`.
        workers: In place of `sweep.workers`.
        console: Where to draw.

    Raises:
        PTv2Error: As `flow.run`, and where the sweep of a task failed; the others are printed.
    """
    workspace = settings.root
    # a backbone's folder is relative to the workspace, as under DVC
    os.chdir(workspace)
    settings = load_settings(Path(settings.path.name))
    with _drawing(console) as on_look:
        records, failed = flow.run(settings, tasks, trials=trials, workers=workers, on_look=on_look)
    plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    for record in records:
        counts = ", ".join(f"{count} {state}" for state, count in record.counts().items())
        words = f"swept {record.task}: {counts}; {record.epochs_spent} epochs"
        console.print(words + (f"; {record.stopped}" if record.stopped else ""), **plain)
        console.print(finalists_table(record))
    where = "" if workspace == Path() else f" -C {workspace}"
    for record in records:
        page = TaskPaths(root=workspace, task=record.task).sweep / PAGE
        study = f"ptv2 study {record.task}{where}"
        apply, run_it = f"ptv2 apply {record.task}{where}", f"ptv2 run --task {record.task}{where}"
        console.print(f"page      {page} (`{study}` prints all trials)", **plain)
        console.print(f"apply     {apply}, then {run_it}", **plain)
    if failed is not None:
        raise failed


@contextmanager
def _drawing(console: Console) -> Iterator[OnLook]:
    """Yield what draws a look: a table in a terminal, a line for each ended trial elsewhere."""
    if not console.is_terminal:
        told: set[tuple[str, int]] = set()

        def tell(look: Look) -> None:
            for one in look.ended:
                if (look.task, one.number) not in told:
                    told.add((look.task, one.number))
                    words = f"{look.task}: trial {one.number} {_state(one)}: {_drawn(one)}"
                    console.print(words, markup=False, highlight=False, soft_wrap=True)

        yield tell
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield lambda look: live.update(picture(look))


def picture(look: Look) -> Group:
    """Return how a sweep stands: what runs, what is best, and how long it will take."""
    states = [one.state for one in look.ended]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    head = f"sweep of {look.task}: {len(states)} of {look.asked} trials"
    if counts:
        head += f" ({counts})"
    if look.finalists_left:
        head += f", {look.finalists_left} trainings of finalists to come"
    if look.seconds_left is not None:
        head += f", about {_minutes(look.seconds_left)} left"
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "state", "epoch", "dev"):
        table.add_column(name, justify="left" if name == "state" else "right")
    table.add_column("settings", overflow="fold")
    scored = [one for one in look.ended if one.value is not None]
    best = sorted(scored, key=lambda one: -(one.value or 0.0))[:SHOWN_BEST]
    for one in look.running:
        _row(table, one, "running")
    for one in best:
        _row(table, one, one.state)
    return Group(Text(head), table)


def _row(table: Table, one: TrialRecord, state: str) -> None:
    score = f"{max(one.epochs):.4f}" if one.epochs else "-"
    table.add_row(str(one.number), state, str(len(one.epochs)), score, Text(_drawn(one)))


def _state(one: TrialRecord) -> str:
    return one.state if one.value is None else f"{one.state} {one.value:.4f}"


def _drawn(one: TrialRecord) -> str:
    drawn = in_words(one.params)
    return f"{drawn} ({one.message})" if one.message else drawn


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
