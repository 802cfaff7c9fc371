"""Plots of a page, as plain values that Plotly draws; colours are the page's."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from pipelines.page_shell import resource

SCRIPT = "plots.js"
NO_SCRIPT = (
    "<noscript><p>The plots need JavaScript; the words below each say what it shows.</p></noscript>"
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot.

    Attributes:
        title: Its heading.
        says: What it shows, in a sentence.
        data: Plotly's traces.
        layout: Plotly's layout.
    """

    title: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def plot_scripts() -> tuple[str, str]:
    """Return Plotly, and the script that draws the figures of a page with it."""
    return get_plotlyjs(), resource("pipelines.page_shell", SCRIPT)


def plot_data(figures: Sequence[Figure]) -> str:
    """Return figures as the JSON that stands in a page."""
    found = [{"data": figure.data, "layout": figure.layout} for figure in figures]
    # no text of a figure can end the element that holds it
    return json.dumps(found, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plot(figure: Figure, number: int) -> Iterator[str]:
    """Yield the place of a figure, `number` of the page's from 0."""
    yield f"<figure><h3>{escape(figure.title)}</h3>"
    yield f'<div class="plot" data-figure="{number}" role="img" aria-describedby="says-{number}" '
    yield f'aria-label="{escape(figure.title)}" style="height:{figure.layout["height"]}px"></div>'
    yield f'<figcaption id="says-{number}">{escape(figure.says)}</figcaption></figure>'
