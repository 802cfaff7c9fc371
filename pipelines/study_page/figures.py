"""The plots of a sweep's page, as plain values that Plotly draws; colours are the page's."""

import html
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from pipelines.compare_words import settings_text, value_text
from pipelines.page_shell import blend
from pipelines.page_shell.plots import Figure
from pipelines.study_plots import (
    LOGARITHMIC,
    NUMERIC,
    categorical,
    importances,
    slice_name,
    surface_names,
    varied_names,
)
from pipelines.sweep.record import SweepRecord, TrialRecord

HEIGHT_PX = 320
WHOLE_PX = 380
MOST_TICKS = 10
COMPLETE, PRUNED, BEST, WINNER = "#3b7ff0", "#8b8f98", "#d97706", "#0f9d76"
# from the lowest score to the highest; readable on light and on dark
RAMP = ((0x6D, 0x5B, 0xD0), (0x2F, 0x86, 0xC4), (0x1F, 0xA0, 0x88), (0x8C, 0xB0, 0x2C))
PARALLEL_TITLE = "Settings side by side"
NO_SURFACE = (
    "Score by setting: not drawn; it takes two complete trials with different settings and scores."
)
NO_PARALLEL = f"{PARALLEL_TITLE}: not drawn; no two trials with a score differ in a setting."
NO_EPOCHS = "Learning curves: not drawn; no trial ended an epoch."


def figures(record: SweepRecord) -> tuple[list[Figure], list[str]]:
    """Return the plots in their order, and a sentence for each that is left out."""
    told = importances(record).says
    candidates = (
        (_history(record), ""),
        (_importances(record), told),
        (_surface(record), NO_SURFACE),
        (_epochs(record), NO_EPOCHS),
        (_parallel(record), NO_PARALLEL),
    )
    drawn = [figure for figure, _ in candidates if figure is not None]
    return drawn, [reason for figure, reason in candidates if figure is None]


def _history(record: SweepRecord) -> Figure:
    complete = _of(record, "complete")
    values = [one.value or 0.0 for one in complete]
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [one.number for one in complete],
            "y": list(accumulate(values, max)),
            "line": {"shape": "hv", "color": BEST, "width": 2},
            "hoverinfo": "skip",
        },
        *_points(record, lambda one: one.number),
    ]
    return Figure(
        title="Score of each trial",
        says="In the order they began. The line is the best complete score until then.",
        data=data,
        layout=_layout("trial", f"dev {record.metric}", highest=record.trials[-1].number),
    )


def _importances(record: SweepRecord) -> Figure | None:
    shares = importances(record).shares
    if shares is None:
        return None
    # Plotly draws the first at the bottom
    names = list(shares)[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [round(100 * shares[name], 1) for name in names],
        "y": names,
        "text": [f"{100 * shares[name]:.0f} %" for name in names],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": COMPLETE},
        "hoverinfo": "skip",
    }
    layout = _layout("share (%)", "")
    # the number behind the longest bar stands in the plot
    layout["xaxis"]["range"] = [0, 118 * max(shares.values())]
    layout["yaxis"]["ticksuffix"] = " "
    return Figure(
        title="Importance of the settings",
        says=(
            "How much each setting parts the better half of the trials from the others "
            "(PED-ANOVA). A pruned trial counts with the best score it had."
        ),
        data=[bars],
        layout=layout,
    )


def _surface(record: SweepRecord) -> Figure | None:
    names = surface_names(record)
    if names is None:
        return _slice(record)
    along, up = names
    complete = [one for one in _of(record, "complete") if {along, up} <= set(one.params)]
    columns = sorted({one.params[along] for one in complete})
    lines = sorted({one.params[up] for one in complete})
    # of trials at one place the best, which comes last
    scores = {
        (one.params[along], one.params[up]): one.value
        for one in sorted(complete, key=lambda one: one.value or 0.0)
    }
    heights = [[scores.get((column, line)) for column in columns] for line in lines]
    ground = {
        "type": "contour",
        "x": columns,
        "y": lines,
        "z": heights,
        "connectgaps": True,
        "colorscale": _scale(),
        "contours": {"coloring": "heatmap"},
        "line": {"width": 0.5, "color": "#ffffff"},
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "hoverinfo": "skip",
    }
    dots = _points(record, lambda one: one.params.get(along), lambda one: one.params.get(up))
    for trace in dots:
        if trace["name"] == "complete":
            trace["marker"]["color"] = "#ffffff"
        trace["marker"]["line"] = {"width": 1.5, "color": "#1b1f26"}
    return Figure(
        title=f"Score by {along} and {up}",
        says=(
            f"Colour is dev {record.metric}, filled in between the complete trials. "
            "A pruned trial shows where one was, and gives no colour."
        ),
        data=[ground, *dots],
        layout=_layout(along, up, along=(along, columns), up=(up, lines)),
    )


def _slice(record: SweepRecord) -> Figure | None:
    name = slice_name(record)
    if name is None:
        return None
    scored = [*_of(record, "pruned"), *_of(record, "complete")]
    values = [one.params[name] for one in scored if name in one.params]
    return Figure(
        title=f"Score by {name}",
        says="A pruned trial has the best score of the epochs it was given.",
        data=_points(record, lambda one: _shown(name, one.params.get(name))),
        layout=_layout(name, f"dev {record.metric}", along=(name, values)),
    )


def _epochs(record: SweepRecord) -> Figure | None:
    data = []
    winner = record.winner.number
    # the winner last, so that it lies above the others
    for one in sorted(record.trials, key=lambda one: one.number == winner):
        if not one.epochs or one.state not in ("complete", "pruned"):
            continue
        is_winner = one.number == winner
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"trial {one.number}",
                "x": list(range(1, len(one.epochs) + 1)),
                "y": list(one.epochs),
                "opacity": 1.0 if is_winner else 0.6,
                "line": {
                    "color": WINNER if is_winner else _colour(one),
                    "width": 3 if is_winner else 1.5,
                    "dash": "dot" if one.state == "pruned" else "solid",
                },
                "marker": {"size": 4},
                "showlegend": False,
                "hovertemplate": f"trial {one.number}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
            }
        )
    if not data:
        return None
    return Figure(
        title="Learning curves",
        says=(
            f"Score on dev after each epoch: the winner, trial {winner}, is the thick green line, "
            "complete trials are blue, pruned ones grey and dotted as far as they went."
        ),
        data=data,
        layout=_layout("epoch", f"dev {record.metric}", highest=record.epochs),
    )


def _parallel(record: SweepRecord) -> Figure | None:
    scored = [*_of(record, "pruned"), *_of(record, "complete")]
    names = varied_names(scored)
    if not names:
        return None
    score = f"dev {record.metric}"
    values = [one.value or 0.0 for one in scored]
    axes = [
        _Axis(
            name,
            [one.params[name] for one in scored if name in one.params],
            is_choice=name not in NUMERIC,
        )
        for name in names
    ]
    axes.append(_Axis(score, values, is_choice=False))
    data = []
    for one in sorted(scored, key=lambda one: (one.state == "complete", one.value or 0.0)):
        is_pruned = one.state == "pruned"
        places = [
            axis.place(one.params[axis.name]) if axis.name in one.params else None
            for axis in axes[:-1]
        ]
        share = axes[-1].place(one.value or 0.0)
        is_winner = one.number == record.winner.number
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": list(range(len(axes))),
                "y": [*places, share],
                "opacity": 0.5 if is_pruned else 0.9,
                "line": {
                    "color": PRUNED if is_pruned else blend(RAMP, share),
                    "width": 4 if is_winner else 1.5,
                    "dash": "dot" if is_pruned else "solid",
                },
                "showlegend": False,
                "hoverinfo": "text",
                "text": _hover(one),
            }
        )
    layout = _layout("", "")
    layout["height"] = WHOLE_PX
    layout["xaxis"] |= {
        "tickvals": list(range(len(axes))),
        "ticktext": [axis.name for axis in axes],
        "range": [-0.3, len(axes) - 0.7],
        "showgrid": True,
    }
    layout["yaxis"] |= {"visible": False, "range": [-0.12, 1.12]}
    layout["margin"] = {"l": 10, "r": 10, "t": 10, "b": 10}
    layout["annotations"] = [
        {
            "x": place,
            "y": height,
            "text": html.escape(text),
            "showarrow": False,
            "yanchor": "bottom" if height == 1.0 else "top" if height == 0.0 else "middle",
            "font": {"size": 11},
        }
        for place, axis in enumerate(axes)
        for height, text in axis.ticks()
    ]
    return Figure(
        title=PARALLEL_TITLE,
        says=(
            "A line for each trial with a score, from violet for the lowest to green for the "
            "highest; the winner is the thick one, pruned trials are grey and dotted."
        ),
        data=data,
        layout=layout,
    )


class _Axis:
    """One axis of the settings side by side: the lowest value at 0, the highest at 1."""

    def __init__(self, name: str, values: Sequence[Any], *, is_choice: bool) -> None:
        """Take a setting or the score, its values, and whether they are numbers or choices."""
        self.name = name
        self._is_log = name in LOGARITHMIC and min(values) > 0
        self._is_choice = is_choice
        shown = [_shown(name, value) if self._is_choice else value for value in values]
        self._values = sorted(set(shown))

    def place(self, value: Any) -> float:
        """Return where a value is."""
        if self._is_choice:
            at = self._values.index(_shown(self.name, value))
            return at / max(len(self._values) - 1, 1)
        scaled = math.log if self._is_log else float
        low, high = scaled(self._values[0]), scaled(self._values[-1])
        return 0.5 if low == high else (scaled(value) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return which places are named, and how."""
        named = (
            self._values if self._is_choice else dict.fromkeys((self._values[0], self._values[-1]))
        )
        return [(self.place(value), value_text(value)) for value in named]


def _setting_axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the axis of a setting with these values."""
    if name not in NUMERIC:
        return {"type": "category"}
    if name not in LOGARITHMIC or min(values) <= 0:
        return {}
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    # Plotly writes the numbers between powers of ten as 2 and 5 alone
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _points(
    record: SweepRecord,
    along: Callable[[TrialRecord], Any],
    up: Callable[[TrialRecord], Any] = lambda one: one.value,
) -> list[dict[str, Any]]:
    """Return the trials with a score as points, pruned and complete apart."""
    traces = []
    for state, colour, symbol in (("pruned", PRUNED, "x"), ("complete", COMPLETE, "circle")):
        shown = [
            one for one in _of(record, state) if along(one) is not None and up(one) is not None
        ]
        if not shown:
            continue
        is_winner = [one.number == record.winner.number for one in shown]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": state,
                "x": [along(one) for one in shown],
                "y": [up(one) for one in shown],
                "marker": {
                    "color": colour,
                    "symbol": ["star" if wins else symbol for wins in is_winner],
                    "size": [15 if wins else 8 for wins in is_winner],
                    "opacity": 1.0,
                },
                "hoverinfo": "text",
                "text": [_hover(one) for one in shown],
            }
        )
    return traces


def _of(record: SweepRecord, state: str) -> list[TrialRecord]:
    return [one for one in record.trials if one.state == state and one.value is not None]


def _colour(one: TrialRecord) -> str:
    return PRUNED if one.state == "pruned" else COMPLETE


def _hover(one: TrialRecord) -> str:
    # Plotly reads a text of its figures as HTML
    settings = html.escape(settings_text(one.params)).replace(", ", "<br>")
    return f"trial {one.number}, {one.state}: {one.value:.4f}<br>{settings}"


def _shown(name: str, value: Any) -> Any:
    """Return a value as an axis takes it: a choice as text."""
    return value if value is None or name in NUMERIC else str(categorical(value))


def _scale() -> list[list[Any]]:
    return [[place / 10, blend(RAMP, place / 10)] for place in range(11)]


def _layout(
    x_title: str,
    y_title: str,
    *,
    along: tuple[str, Sequence[Any]] | None = None,
    up: tuple[str, Sequence[Any]] | None = None,
    highest: int | None = None,
) -> dict[str, Any]:
    """Return a layout.

    Args:
        x_title: Of the axis from left to right.
        y_title: Of the other.
        along: The setting on the axis from left to right, and the values it has there.
        up: The same of the other.
        highest: The last of the whole numbers on the axis from left to right.
    """
    xaxis: dict[str, Any] = {"title": {"text": x_title}, "automargin": True, "zeroline": False}
    yaxis: dict[str, Any] = {"title": {"text": y_title}, "automargin": True, "zeroline": False}
    for axis, setting in ((xaxis, along), (yaxis, up)):
        if setting is not None:
            axis |= _setting_axis(*setting)
    if highest is not None:
        xaxis |= {"dtick": max(1, math.ceil(highest / MOST_TICKS)), "rangemode": "tozero"}
    return {
        "height": HEIGHT_PX,
        "margin": {"l": 50, "r": 10, "t": 10, "b": 40},
        "xaxis": xaxis,
        "yaxis": yaxis,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }
