"""A comparison in words and tables: for the terminal and as Markdown. The page takes both."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipelines.compare_data import Comparison
from pipelines.compare_stats import SUBJECT, Difference, Summary

ABSENT = "-"
AVERAGE = "average"
CLEAR = "*"
MAIN_OTHER = "finetune"
"""What the main table holds `SUBJECT` against."""
MOST_NAME_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table of texts.

    Attributes:
        title: Its heading.
        note: How to read it.
        headers: Of the columns.
        rows: Cells, in the order of the headers.
        num_names: How many columns, from the left, are text; the others are numbers.
        has_total: Whether the last row sums the others up.
    """

    title: str
    note: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int
    has_total: bool = False


def points(score: float) -> str:
    """Return a score of 0 to 1 as points of 100, with one decimal."""
    return f"{100 * score:.1f}"


def spread(mean: float, sd: float | None) -> str:
    """Return mean and standard deviation in points."""
    return points(mean) if sd is None else f"{points(mean)} ± {points(sd)}"


def gap(difference: Difference | None) -> str:
    """Return a difference with its interval, and a mark where that excludes 0."""
    if difference is None:
        return ABSENT
    if difference.low is None or difference.high is None:
        return _signed(difference.value)
    ends = f"[{_signed(difference.low)}, {_signed(difference.high)}]"
    return f"{_signed(difference.value)} {ends}" + (f" {CLEAR}" if difference.is_clear else "")


def share(value: float) -> str:
    """Return a share as a percentage with three significant digits."""
    return f"{100 * value:.3g}"


def size(num_bytes: int | None) -> str:
    """Return bytes in the unit that people read."""
    if num_bytes is None:
        return ABSENT
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes} B"


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what was compared, when, where and how, by name."""
    trials = ", ".join(
        f"{method} {comparison.num_trials.get(method, 0)}" for method in comparison.methods
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    millions = comparison.backbone_parameters / 1e6
    return [
        (
            "Backbone",
            f"{comparison.backbone}, {millions:.1f} million parameters, "
            f"{comparison.backbone_layers} layers",
        ),
        ("Hyper-parameters chosen on", comparison.chosen_on),
        ("Search trials for each task", trials),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Machine", comparison.machine),
        ("Date", comparison.date),
        ("Code", comparison.git_commit or "not in a repository"),
        ("Versions", versions or ABSENT),
        ("Results", comparison.results),
    ]


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


def missing_note(summary: Summary) -> str | None:
    """Return what has not finished, if anything has not."""
    if not summary.missing:
        return None
    parts = [
        f"{task} {method} (seed {', '.join(map(str, seeds))})"
        for task, method, seeds in summary.missing
    ]
    return (
        f"Not finished: {'; '.join(parts)}. The average is over the tasks that all methods "
        f"finished for all seeds: {', '.join(summary.complete_tasks) or 'none'}."
    )


def main_sheet(comparison: Comparison, summary: Summary) -> Sheet:
    """Return the table that answers the question: a row a task, a column a method."""
    has_gap = {SUBJECT, MAIN_OTHER} <= set(comparison.methods)
    has_costs = SUBJECT in comparison.methods

    def costs(task: str) -> list[str]:
        cell = summary.cell(task, SUBJECT)
        if cell is None:
            return [ABSENT, ABSENT]
        return [share(cell.tuned_share), f"{cell.artifact_bytes / 1e3:,.0f}"]

    rows = []
    for task in comparison.tasks:
        cells = [_result(comparison, summary, task.name, one) for one in comparison.methods]
        if has_gap:
            cells.append(gap(summary.difference(task.name, MAIN_OTHER)))
        rows.append((task.name, task.metric, *cells, *(costs(task.name) if has_costs else ())))
    if summary.averages:
        cells = [spread(one.test, one.test_sd) for one in summary.averages]
        if has_gap:
            cells.append(gap(summary.difference(None, MAIN_OTHER)))
        number = len(summary.complete_tasks)
        over = f"{number} task{'s' if number > 1 else ''}"
        rows.append((AVERAGE, over, *cells, *([""] * (2 if has_costs else 0))))
    gap_header = (f"{SUBJECT} - {MAIN_OTHER}",) if has_gap else ()
    cost_headers = (f"{SUBJECT} %", f"{SUBJECT} KB") if has_costs else ()
    return Sheet(
        title="Test scores",
        note=(
            "Points of 100, mean ± sample standard deviation over the seeds; in brackets, the "
            f"number of seeds where some have not finished. {SUBJECT} %: tuned parameters, the "
            "head aside, by those of the backbone."
        ),
        headers=("task", "metric", *comparison.methods, *gap_header, *cost_headers),
        rows=tuple(rows),
        num_names=2,
        has_total=bool(summary.averages),
    )


def gaps_sheet(comparison: Comparison, summary: Summary) -> Sheet:
    """Return the differences of `SUBJECT` and each other method."""
    rows = [
        (
            one.task or f"{AVERAGE} of {len(summary.complete_tasks)}",
            f"{one.method} - {one.other}",
            _signed(one.value),
            ABSENT if one.low is None else _signed(one.low),
            ABSENT if one.high is None else _signed(one.high),
            ABSENT if one.p_value is None else _p_value(one.p_value, summary.resamples),
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


def sheets(comparison: Comparison, summary: Summary) -> list[Sheet]:
    """Return all tables, in their order."""
    return [
        main_sheet(comparison, summary),
        gaps_sheet(comparison, summary),
        costs_sheet(summary),
        data_sheet(comparison),
        runs_sheet(comparison),
    ]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings in one line; numbers with three significant digits."""
    return ", ".join(f"{name} {_short(value)}" for name, value in settings.items()) or ABSENT


def table(comparison: Comparison, summary: Summary) -> Table:
    """Return the main table for a terminal; four methods take less than 140 columns."""
    sheet = main_sheet(comparison, summary)
    shown = Table(
        title=Text(f"{comparison.backbone}: test scores, mean ± sd over seeds"),
        title_justify="left",
        caption=Text("\n".join(("", *_footer(comparison, summary)))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for place, header in enumerate(sheet.headers):
        is_name = place < sheet.num_names
        # on a narrow terminal the widest columns take two lines or three, and nothing is cut
        shown.add_column(
            Text(header),
            justify="left" if is_name else "right",
            overflow="fold",
            max_width=MOST_NAME_WIDTH if is_name else None,
        )
    for place, row in enumerate(sheet.rows):
        if sheet.has_total and place == len(sheet.rows) - 1:
            shown.add_section()
        # so that a line breaks before the sign, not after it
        shown.add_row(*(Text(cell.replace("± ", "±")) for cell in row))
    return shown


def markdown(comparison: Comparison, summary: Summary) -> str:
    """Return the whole comparison as Markdown."""
    lines = [f"# Comparison on {_plain(comparison.backbone)}", ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in facts(comparison)]
    if note := missing_note(summary):
        lines += ["", f"**{_plain(note)}**"]
    for sheet in sheets(comparison, summary):
        lines += ["", f"## {sheet.title}", "", _plain(sheet.note), "", *_markdown_rows(sheet)]
    return "\n".join(lines) + "\n"


def _footer(comparison: Comparison, summary: Summary) -> Iterator[str]:
    known = dict(facts(comparison))
    if SUBJECT in comparison.methods and MAIN_OTHER in comparison.methods:
        yield f"{CLEAR} the 95 % interval of the difference excludes 0 (paired bootstrap over test)"
    if note := missing_note(summary):
        yield note
    for name in ("Hyper-parameters chosen on", "Search trials for each task", "Seeds", "Results"):
        yield f"{name}: {known[name]}"


def _result(comparison: Comparison, summary: Summary, task: str, method: str) -> str:
    cell = summary.cell(task, method)
    if cell is None:
        return ABSENT
    shown = spread(cell.test, cell.test_sd)
    return shown if len(cell.seeds) == len(comparison.seeds) else f"{shown} ({len(cell.seeds)})"


def _markdown_rows(sheet: Sheet) -> Iterator[str]:
    ruler = ["---"] * sheet.num_names + ["--:"] * (len(sheet.headers) - sheet.num_names)
    for cells in (sheet.headers, ruler, *sheet.rows):
        yield f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line of a table."""
    for character in "\\`*|<[":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _signed(difference: float) -> str:
    # what rounds to nothing has no sign
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("+0.0", "0.0")


def _p_value(value: float, resamples: int) -> str:
    """Return a p-value; the least that so many resamples can show is a bound, not a number."""
    least = 2 / (resamples + 1)
    return f"≤ {least:.1g}" if value <= least else f"{value:.3g}"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "[" + " ".join(map(str, value)) + "]"
    return str(value)
