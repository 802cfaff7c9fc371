"""The plots of a comparison's page, as plain values that Plotly draws; colours are the page's."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipelines.compare_data import Comparison, Row, Trial
from pipelines.compare_page.looks import Look, looks_of
from pipelines.compare_stats import Difference, Summary
from pipelines.compare_words import AVERAGE, gap, points, settings_text
from pipelines.page_shell.plots import Figure
from ptv2_core.config import Method

PROMPTED: tuple[Method, ...] = ("prompt_tuning", "ptv2")
HEIGHT_PX = 280
FOREST_ROW_PX = 30
NAME_OFFSET = 0.2


@dataclass(frozen=True, kw_only=True)
class Group:
    """The plots that answer one question.

    Attributes:
        title: The question.
        note: How to read them; without a figure, how to get one.
        methods: The names in the plots, for the legend.
        figures: The plots.
        is_wide: Whether a plot takes the whole width.
    """

    title: str
    note: str
    methods: tuple[str, ...]
    figures: tuple[Figure, ...]
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A trial or a final run in a plot of a setting against the dev score."""

    method: str
    x: float | str
    dev: float
    is_final: bool
    text: str


def groups(comparison: Comparison, summary: Summary) -> list[Group]:
    """Return all plots, in their order."""
    return [
        *_forests(comparison, summary),
        _lengths(comparison),
        _depths(comparison),
        _starts(comparison),
        _curves(comparison),
    ]


def _forests(comparison: Comparison, summary: Summary) -> Iterable[Group]:
    subject = comparison.subject
    if subject is None:
        return
    # fine-tuning comes first, a probe does not come: nobody asks by how much it is passed
    others = [name for name in comparison.methods if comparison.method_of(name) != "probe"]
    for other in sorted(others, key=lambda name: comparison.method_of(name) != "finetune"):
        found = [
            one
            for one in (*summary.differences, *summary.average_differences)
            if one.other == other
        ]
        if found:
            look = looks_of(comparison)[subject]
            yield Group(
                title=f"{subject} against {other}",
                note=(
                    "Difference of the test scores and its 95 % interval, in points. Filled: the "
                    "interval excludes 0. Right of 0, "
                    f"{subject} is better."
                ),
                methods=(),
                figures=(_forest(found, look, len(summary.complete_tasks)),),
                is_wide=True,
            )


def _forest(found: Sequence[Difference], look: Look, num_complete: int) -> Figure:
    between = f"{found[0].method} - {found[0].other}"
    names = [one.task or f"{AVERAGE} of {num_complete}" for one in found]
    marker = {
        "color": look.colour,
        "size": 9,
        "symbol": [
            ("diamond" if one.task is None else "circle") + ("" if one.is_clear else "-open")
            for one in found
        ],
        "line": {"width": 2, "color": look.colour},
    }
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [100 * one.value for one in found],
        "y": [html.escape(name) for name in names],
        "text": [
            html.escape(f"{name}: {gap(one)}") for name, one in zip(names, found, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": marker,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0 if one.high is None else 100 * (one.high - one.value) for one in found],
            "arrayminus": [0 if one.low is None else 100 * (one.value - one.low) for one in found],
            "thickness": 2,
            "width": 4,
            "color": look.colour,
        },
    }
    spoken = "; ".join(f"{name} {gap(one)}" for name, one in zip(names, found, strict=True))
    layout = plot_layout(f"{between}, test score (points)", "task")
    layout["height"] = 110 + FOREST_ROW_PX * len(found)
    layout["xaxis"] |= {"zeroline": True, "showgrid": True}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category", "automargin": True}
    # the names of the tasks say what the axis is, and need its room
    layout["yaxis"]["title"] = {"text": ""}
    return Figure(
        title=f"{between} by task",
        says=f"Points, with 95 % intervals: {spoken}.",
        data=[trace],
        layout=layout,
    )


def _lengths(comparison: Comparison) -> Group:
    return _against(
        comparison,
        title="Score against prompt length",
        what="prompt length",
        x_title="prompt length (positions, log scale)",
        setting=lambda settings: settings.get("prompt_length"),
        methods=PROMPTED,
        axis={"type": "log", "dtick": 0.30103},
        remedy="compare.space.ptv2.prompt_length, for example [8, 64]",
    )


def _depths(comparison: Comparison) -> Group:
    def depth(settings: Mapping[str, Any]) -> int | None:
        layers = settings.get("prompt_layers")
        if layers == "all":
            return comparison.backbone_layers
        return len(layers) if isinstance(layers, list | tuple) else layers

    return _against(
        comparison,
        title="Score against depth",
        what="depth",
        x_title="layers with a prompt (number)",
        setting=depth,
        methods=("ptv2",),
        axis={"dtick": 1 if comparison.backbone_layers <= 12 else 4},
        remedy="compare.space.ptv2.prompt_layers, for example [all, 4, 2]",
    )


def _starts(comparison: Comparison) -> Group:
    return _against(
        comparison,
        title="Embedding against MLP",
        what="reparameterization",
        x_title="reparameterization of the prompt (kind)",
        setting=lambda settings: settings.get("reparameterization"),
        methods=PROMPTED,
        axis={},
        remedy="compare.space.ptv2.reparameterization, for example [embedding, mlp]",
    )


def _against(
    comparison: Comparison,
    *,
    title: str,
    what: str,
    x_title: str,
    setting: Callable[[Mapping[str, Any]], Any],
    methods: Sequence[Method],
    axis: Mapping[str, Any],
    remedy: str,
) -> Group:
    """Return a plot a task of a setting against the dev score, where the setting varies."""
    shown = tuple(name for name in comparison.methods if comparison.method_of(name) in methods)
    looks = looks_of(comparison)
    everything: tuple[Row | Trial, ...] = (*comparison.trials, *comparison.rows)
    figures = []
    for task in comparison.tasks:
        found = [
            point
            for one in everything
            if one.task == task.name and one.method in shown
            if (point := _point(one, setting(one.settings))) is not None
        ]
        if len({point.x for point in found}) < 2:
            continue
        layout = plot_layout(x_title, f"dev {task.metric} (points)")
        layout["xaxis"] |= axis
        data = [
            _points([one for one in found if one.method == name], looks[name]) for name in shown
        ]
        names = sorted({point.x for point in found if isinstance(point.x, str)})
        if names:
            _place_names(names, data, layout)
        figures.append(
            Figure(
                title=f"{task.name}: dev {task.metric} by {what}",
                says=_best_of(found),
                data=data,
                layout=layout,
            )
        )
    if not figures:
        note = f"All runs and trials have the same value of it. To see it vary, set {remedy}."
        return Group(title=title, note=note, methods=(), figures=())
    note = (
        "Open: a trial of the search (pale where it was pruned). Filled: a final run, one a seed. "
        "Scores are on dev, which chose the settings: read the shape, not the height. Other "
        "settings vary as well."
    )
    return Group(title=title, note=note, methods=shown, figures=tuple(figures))


def _point(one: Row | Trial, x: Any) -> _Point | None:
    is_final = isinstance(one, Row)
    dev = one.dev if isinstance(one, Row) else one.value
    if x is None or dev is None:
        return None
    what = f"seed {one.seed}" if isinstance(one, Row) else f"trial {one.number}, {one.state}"
    text = f"{one.method}, {what}: {points(dev)} ({settings_text(one.settings)})"
    return _Point(method=one.method, x=x, dev=dev, is_final=is_final, text=text)


def _points(found: Sequence[_Point], look: Look) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [point.x for point in found],
        "y": [100 * point.dev for point in found],
        "text": [html.escape(point.text).replace(" (", "<br>(") for point in found],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": look.colour,
            "size": 9,
            "symbol": [look.symbol + ("" if one.is_final else "-open") for one in found],
            "opacity": [0.45 if ", pruned:" in one.text else 1.0 for one in found],
            "line": {"width": 1.5, "color": look.colour},
        },
    }


def _place_names(
    names: Sequence[str], data: Sequence[dict[str, Any]], layout: dict[str, Any]
) -> None:
    """Give names places on an axis, the methods of each side by side."""
    for number, trace in enumerate(data):
        aside = NAME_OFFSET * (number - (len(data) - 1) / 2)
        trace["x"] = [names.index(name) + aside for name in trace["x"]]
    layout["xaxis"] |= {
        "tickvals": list(range(len(names))),
        "ticktext": [html.escape(name) for name in names],
        "range": [-0.5, len(names) - 0.5],
    }


def _best_of(found: Sequence[_Point]) -> str:
    """Return the best value of the setting for each method, in words."""
    parts = []
    for method in dict.fromkeys(point.method for point in found):
        of_method = [point for point in found if point.method == method]
        best = max(of_method, key=lambda point: point.dev)
        parts.append(
            f"{method} at {best.x} ({points(best.dev)}, the best of {len(of_method)} runs)"
        )
    return f"Best on dev: {'; '.join(parts)}."


def _curves(comparison: Comparison) -> Group:
    figures = []
    shown: dict[str, None] = {}
    looks = looks_of(comparison)
    for task in comparison.tasks:
        data, ends = [], []
        for method in comparison.methods:
            runs = [row for row in comparison.runs(task.name, method) if row.history]
            if runs:
                shown[method] = None
                data += _curve(runs, method, looks[method])
                best = fmean(max(dev for _, _, dev in row.history) for row in runs)
                longest = max(len(row.history) for row in runs)
                ends.append(f"{method} {points(best)} within {longest} epochs")
        if data:
            layout = plot_layout("epoch (number)", f"dev {task.metric} (points)")
            layout["xaxis"] |= {"rangemode": "tozero", "tickformat": "d"}
            figures.append(
                Figure(
                    title=f"{task.name}: dev {task.metric} by epoch",
                    says=f"Best dev score, mean over seeds: {'; '.join(ends)}.",
                    data=data,
                    layout=layout,
                )
            )
    note = "Thin: one seed. Thick: the mean, as far as all seeds go before they stop early."
    if not figures:
        note = "No run kept the scores of its epochs."
    return Group(title="Learning curves", note=note, methods=tuple(shown), figures=tuple(figures))


def _curve(runs: Sequence[Row], method: str, look: Look) -> list[dict[str, Any]]:
    def line(
        epochs: Sequence[int], devs: Sequence[float], name: str, **style: Any
    ) -> dict[str, Any]:
        return {
            "type": "scatter",
            "mode": "lines",
            "x": list(epochs),
            "y": [100 * dev for dev in devs],
            "hovertemplate": f"{method}, {name}, epoch %{{x}}: %{{y:.1f}}<extra></extra>",
            **style,
        }

    thin = {"line": {"color": look.colour, "width": 1}, "opacity": 0.4}
    lines = [
        line(
            [epoch for epoch, _, _ in row.history],
            [dev for _, _, dev in row.history],
            f"seed {row.seed}",
            **thin,
        )
        for row in runs
    ]
    together = list(zip(*(row.history for row in runs), strict=False))
    means = [fmean(dev for _, _, dev in of_epoch) for of_epoch in together]
    epochs = [of_epoch[0][0] for of_epoch in together]
    marker = {"symbol": look.symbol, "size": 6, "color": look.colour}
    thick = {"line": {"color": look.colour, "width": 2.5}, "marker": marker}
    return [*lines, {**line(epochs, means, "mean", **thick), "mode": "lines+markers"}]


def plot_layout(x_title: str, y_title: str) -> dict[str, Any]:
    """Return a layout with titles on both axes."""
    axis = {"zeroline": False}
    return {
        "height": HEIGHT_PX,
        "showlegend": False,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 48},
        "xaxis": {**axis, "title": {"text": html.escape(x_title), "standoff": 10}},
        "yaxis": {**axis, "title": {"text": html.escape(y_title), "standoff": 8}},
        "hovermode": "closest",
    }
