"""The tables of a comparison, as texts: for the terminal, Markdown and the page."""

from dataclasses import dataclass

from pipelines.compare_data import Comparison
from pipelines.compare_stats import Summary
from pipelines.compare_windows import Windows, summarise_windows
from pipelines.compare_words import (
    ABSENT,
    AVERAGE,
    CLEAR,
    flat,
    gap,
    p_value,
    points,
    settings_text,
    share,
    signed,
    size,
    spread,
    wide,
)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table of texts.

    Attributes:
        title: Its heading.
        note: How to read it.
        headers: Of the columns.
        rows: Cells, in the order of the headers.
        num_names: How many columns, from the left, are text; the others are numbers.
        num_totals: How many rows, the last ones, sum the others up.
    """

    title: str
    note: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int
    num_totals: int = 0


def sheets(comparison: Comparison, summary: Summary) -> list[Sheet]:
    """Return all tables, in their order."""
    windows = summarise_windows(comparison, summary)
    return [
        main_sheet(comparison, summary),
        *([variants_sheet(comparison)] if comparison.variants else []),
        gaps_sheet(comparison, summary),
        *([windows_sheet(comparison, windows)] if windows else []),
        costs_sheet(summary),
        data_sheet(comparison),
        runs_sheet(comparison),
    ]


def main_sheet(comparison: Comparison, summary: Summary) -> Sheet:
    """Return the table that answers the question: a row a task, a column a method."""
    subject, other = comparison.subject, comparison.first_of("finetune")
    has_gap = subject is not None and other is not None

    def costs(task: str) -> list[str]:
        cell = None if subject is None else summary.cell(task, subject)
        if cell is None:
            return [ABSENT, ABSENT]
        return [share(cell.tuned_share), f"{cell.artifact_bytes / 1e3:,.0f}"]

    rows = []
    for task in comparison.tasks:
        cells = [_result(comparison, summary, task.name, one) for one in comparison.methods]
        if has_gap:
            cells.append(gap(summary.difference(task.name, str(other))))
        rows.append((task.name, task.metric, *cells, *(costs(task.name) if subject else ())))
    totals = _totals(summary, str(other) if has_gap else None)
    width = 2 + len(comparison.methods) + has_gap + 2 * (subject is not None)
    rows += [(*cells, *([""] * (width - len(cells)))) for cells in totals]
    gap_header = (f"{subject} - {other}",) if has_gap else ()
    cost_headers = (f"{subject} %", f"{subject} KB") if subject else ()
    costs_note = "tuned parameters, the head aside, by those of the backbone."
    return Sheet(
        title="Test scores",
        note=(
            "Points of 100, mean ± sample standard deviation over the seeds; in brackets, the "
            "number of seeds where some have not finished. The average's ± is over the seeds' "
            "averages; spread: the mean over the tasks of each task's ±; worst seed: the lowest of "
            f"the seeds' averages.{f' {subject} %: {costs_note}' if subject else ''}"
        ),
        headers=("task", "metric", *comparison.methods, *gap_header, *cost_headers),
        rows=tuple(rows),
        num_names=2,
        num_totals=len(totals),
    )


def _totals(summary: Summary, other: str | None) -> list[tuple[str, ...]]:
    """Return the rows under the tasks: the average, and how much of it is luck."""
    if not summary.averages:
        return []
    number = len(summary.complete_tasks)
    over = f"{number} task{'s' if number > 1 else ''}"
    average = [spread(one.test, one.test_sd) for one in summary.averages]
    if other is not None:
        average.append(gap(summary.difference(None, other)))
    totals = [(AVERAGE, over, *average)]
    if all(one.spread is not None for one in summary.averages):
        spreads = [points(one.spread or 0.0) for one in summary.averages]
        worst = [ABSENT if one.worst is None else points(one.worst) for one in summary.averages]
        totals += [("spread", over, *spreads), ("worst seed", over, *worst)]
    return totals


def _result(comparison: Comparison, summary: Summary, task: str, method: str) -> str:
    cell = summary.cell(task, method)
    if cell is None:
        return ABSENT
    shown = spread(cell.test, cell.test_sd)
    return shown if len(cell.seeds) == len(comparison.seeds) else f"{shown} ({len(cell.seeds)})"


def variants_sheet(comparison: Comparison) -> Sheet:
    """Return what the names mean that are no methods."""
    rows = [
        (one.name, one.method, settings_text(dict(flat(one.changes))))
        for one in comparison.variants
    ]
    return Sheet(
        title="Variants",
        note="A variant is a method with settings of its own, laid over those of train.",
        headers=("variant", "method", "changes"),
        rows=tuple(rows),
        num_names=3,
    )


def gaps_sheet(comparison: Comparison, summary: Summary) -> Sheet:
    """Return the differences of the subject and each other method."""
    rows = [
        (
            one.task or f"{AVERAGE} of {len(summary.complete_tasks)}",
            f"{one.method} - {one.other}",
            signed(one.value),
            ABSENT if one.low is None else signed(one.low),
            ABSENT if one.high is None else signed(one.high),
            ABSENT if one.p_value is None else p_value(one.p_value, summary.resamples),
            CLEAR if one.is_clear else "",
        )
        for other in comparison.methods
        for one in (*summary.differences, *summary.average_differences)
        if one.other == other
    ]
    return Sheet(
        title="Differences",
        note=gaps_note(summary),
        headers=("task", "methods", "points", "from", "to", "p", "excludes 0"),
        rows=tuple(rows),
        num_names=2,
    )


def gaps_note(summary: Summary) -> str:
    """Return how the intervals were made and what they do not say."""
    return (
        f"Intervals are 95 % percentile intervals of a paired bootstrap over the test examples "
        f"({summary.resamples:,} resamples, seed {summary.seed}); rows about one text are drawn "
        "together, and a resample's score is the mean over the seeds. "
        f"{CLEAR}: the interval excludes 0. Each stands for itself: of 20 without a true "
        "difference, one is expected to be marked. How the result varies with the seed is the ±, "
        "not the interval."
    )


def windows_sheet(comparison: Comparison, windows: Windows) -> Sheet:
    """Return how far off a learning rate may be."""
    assert comparison.window is not None, "it has windows"
    factor = comparison.window.factor
    rows = [
        (
            cell.task,
            cell.method,
            points(cell.best),
            f"{cell.best_rate:.2g}",
            f"{cell.rates[0]:.2g} to {cell.rates[-1]:.2g}",
            share(cell.share),
            wide(cell.share, factor),
            ABSENT if cell.probe_share is None else share(cell.probe_share),
        )
        for cell in windows.cells
    ]
    totals = [
        (
            AVERAGE,
            one.method,
            points(one.best),
            "",
            "",
            share(one.share),
            wide(one.share, factor),
            ABSENT if one.probe_share is None else share(one.probe_share),
        )
        for one in windows.averages
    ]
    return Sheet(
        title="Learning-rate windows",
        note=windows_note(comparison, windows),
        headers=(
            "task",
            "method",
            "best dev",
            "at",
            "rates",
            "window %",
            "wide",
            "≥ probe %",
        ),
        rows=(*rows, *totals),
        num_names=2,
        num_totals=len(totals),
    )


def windows_note(comparison: Comparison, windows: Windows) -> str:
    """Return how the windows were made, and what happened in them."""
    window = comparison.window
    assert window is not None, "it has windows"
    laid = settings_text(dict(flat(window.train)))
    parts = [
        f"Best dev score of trainings at {window.points} learning rates, evenly spaced in logs "
        f"over a range of x{window.factor:g} around the rate of each name's own settings, without "
        f"a search; mean over the seeds {', '.join(map(str, window.seeds))}."
    ]
    if window.train:
        parts.append(f"All of them with {laid}.")
    parts.append(
        "Window: the share of that range in which the score is within 1 point of the best, with "
        "straight lines between the rates; wide: the same as a factor. ≥ probe: the share in which "
        "it is at least the probe's. The average is over the tasks. Test scores are not looked at, "
        "and nothing is chosen here."
    )
    if window.moved:
        names = ", ".join(f"{task} {name}" for task, name in window.moved)
        parts.append(f"Moved down, to end at the highest rate that the method may have: {names}.")
    diverged = [
        f"{cell.task} {cell.method} at {rate:.2g} ({count})"
        for cell in windows.cells
        for rate, count in zip(cell.rates, cell.diverged, strict=True)
        if count
    ]
    if diverged:
        parts.append(f"Diverged, and count as 0 (how many seeds): {', '.join(diverged)}.")
    return " ".join(parts)


def costs_sheet(summary: Summary) -> Sheet:
    """Return what each method costs."""
    rows = [
        (
            cell.task,
            cell.method,
            f"{cell.tuned_parameters:,}",
            share(cell.tuned_share),
            size(cell.artifact_bytes),
            f"{cell.seconds:,.1f}",
            size(cell.peak_memory_bytes),
        )
        for cell in summary.cells
    ]
    return Sheet(
        title="Resources",
        note=(
            "Of one training run with the chosen hyper-parameters, mean over the seeds; peak "
            "memory is the highest. Tuned parameters are without the head, which every method "
            "tunes; % is by those of the backbone. States below the first prompt (of a probe: all) "
            "are computed once for all runs of a task; that time is not in the seconds."
        ),
        headers=("task", "method", "tuned parameters", "%", "artifact", "seconds", "peak memory"),
        rows=tuple(rows),
        num_names=2,
    )


def data_sheet(comparison: Comparison) -> Sheet:
    """Return what data each task has."""
    rows = [
        (
            task.name,
            task.kind,
            task.cut or "as it is",
            *(f"{count:,}" for count in (task.train, task.dev, task.test)),
        )
        for task in comparison.tasks
    ]
    return Sheet(
        title="Data",
        note=f"Rows of each split. Hyper-parameters were chosen on {comparison.chosen_on}.",
        headers=("task", "kind", "how it was cut", "train", "dev", "test"),
        rows=tuple(rows),
        num_names=3,
    )


def runs_sheet(comparison: Comparison) -> Sheet:
    """Return every final run, with its settings."""
    rows = [
        (
            row.task,
            row.method,
            settings_text(row.settings),
            str(row.seed),
            points(row.dev),
            points(row.test),
            f"{row.seconds:,.1f}",
        )
        for task in comparison.tasks
        for method in comparison.methods
        for row in comparison.runs(task.name, method)
    ]
    return Sheet(
        title="Runs",
        note="Every final run, with the settings that its search chose.",
        headers=("task", "method", "settings", "seed", "dev", "test", "seconds"),
        rows=tuple(rows),
        num_names=3,
    )
