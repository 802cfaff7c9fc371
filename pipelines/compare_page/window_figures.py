"""The plots of learning-rate windows: dev score against learning rate, one a task."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.compare_data import Comparison, TaskFacts
from pipelines.compare_page.figures import Group, plot_layout
from pipelines.compare_page.looks import METHOD_LOOKS, Look, looks_of
from pipelines.compare_stats import Summary
from pipelines.compare_windows import WindowCell, probe_score, summarise_windows
from pipelines.compare_words import points, share, wide
from pipelines.page_shell.plots import Figure


def window_groups(comparison: Comparison, summary: Summary) -> Iterator[Group]:
    """Yield the plots of the windows; none where none were asked for."""
    windows = summarise_windows(comparison, summary)
    if windows is None or comparison.window is None:
        return
    factor = comparison.window.factor
    figures = []
    for task in comparison.tasks:
        cells = [cell for cell in windows.cells if cell.task == task.name]
        if cells:
            probe = probe_score(comparison, summary, task.name)
            figures.append(_figure(task, cells, probe, comparison, factor))
    yield Group(
        title="Score against learning rate",
        note=(
            "Best dev score, mean over the seeds of the windows. Open: a training diverged there, "
            "and counts as 0. Dotted: the probe's dev score. A broad top forgives a rate that is "
            "a little off."
        ),
        methods=comparison.window.methods,
        figures=tuple(figures),
    )


def _figure(
    task: TaskFacts,
    cells: Sequence[WindowCell],
    probe: float | None,
    comparison: Comparison,
    factor: float,
) -> Figure:
    looks = looks_of(comparison)
    layout = plot_layout("learning rate (log scale)", f"dev {task.metric} (points)")
    layout["xaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1}
    data = [_line(cell, looks[cell.method]) for cell in cells]
    says = "; ".join(
        f"{cell.method} {points(cell.best)} at {cell.best_rate:.2g}, "
        f"within a point of it over {share(cell.share)} % ({wide(cell.share, factor)})"
        for cell in cells
    )
    if probe is not None:
        data.append(_probe_line(cells, probe))
        says += f"; the probe has {points(probe)}"
    return Figure(
        title=f"{task.name}: dev {task.metric} by learning rate",
        says=f"Best on dev: {says}.",
        data=data,
        layout=layout,
    )


def _line(cell: WindowCell, look: Look) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(cell.rates),
        "y": [100 * score for score in cell.scores],
        "hovertemplate": f"{html.escape(cell.method)} at %{{x:.2g}}: %{{y:.1f}}<extra></extra>",
        "line": {"color": look.colour, "width": 2},
        "marker": {
            "color": look.colour,
            "size": 7,
            "symbol": [look.symbol + ("-open" if count else "") for count in cell.diverged],
        },
    }


def _probe_line(cells: Sequence[WindowCell], probe: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [min(cell.rates[0] for cell in cells), max(cell.rates[-1] for cell in cells)],
        "y": [100 * probe, 100 * probe],
        "hovertemplate": "probe: %{y:.1f}<extra></extra>",
        "line": {"color": METHOD_LOOKS["probe"].colour, "width": 1.5, "dash": "dot"},
    }
