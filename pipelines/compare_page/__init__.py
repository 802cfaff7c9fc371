"""A comparison as one HTML file that needs nothing else: no network, no other file."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from pipelines.compare_data import Comparison
from pipelines.compare_page.figures import Figure, Group, groups
from pipelines.compare_page.looks import looks_of
from pipelines.compare_page.window_figures import window_groups
from pipelines.compare_report import facts, missing_note
from pipelines.compare_sheets import Sheet, sheets
from pipelines.compare_stats import Summary
from pipelines.compare_words import variant_text

METHODS = {
    "probe": "the backbone stays as it is; only the head is tuned.",
    "prompt_tuning": "a prompt at the input layer alone, and the head; the backbone is frozen.",
    "ptv2": "P-Tuning v2: a prompt in every layer, and the head; the backbone is frozen.",
    "finetune": "every parameter of the backbone, and the head.",
}


def page(comparison: Comparison, summary: Summary) -> str:
    """Return the whole comparison as one HTML page.

    Its policy lets no request out, and runs no script but the two in it, by their digests.
    """
    first, *others = sheets(comparison, summary)
    plots = [*groups(comparison, summary), *window_groups(comparison, summary)]
    scripts = (get_plotlyjs(), _resource("page.js"))
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; script-src {' '.join(map(_digest, scripts))}"
    )
    title = f"Comparison on {comparison.backbone}"
    body = "\n".join(
        [
            f"<header><h1>{escape(title)}</h1>",
            *_header(comparison, summary),
            "</header>\n<main>",
            *_table(first),
            *_plots(plots, _swatches(comparison)),
            *(line for sheet in others for line in _table(sheet)),
            "</main>",
        ]
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_resource('page.css')}</style></head>",
            f"<body>\n{body}",
            f'<script type="application/json" id="figures">{_figures(plots)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _resource(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return what a policy calls a script that stands in the page."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _figures(plots: Sequence[Group]) -> str:
    found = [
        {"data": figure.data, "layout": figure.layout}
        for group in plots
        for figure in group.figures
    ]
    # no text of a figure can end the element that holds it
    return json.dumps(found, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _header(comparison: Comparison, summary: Summary) -> Iterator[str]:
    if note := missing_note(summary):
        yield f'<p class="warning" role="note">{escape(note)}</p>'
    yield '<dl class="facts">'
    for name, value in facts(comparison):
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    yield "</dl>"
    yield '<dl class="methods">'
    variants = {one.name: variant_text(one) for one in comparison.variants}
    swatches = _swatches(comparison)
    for name in comparison.names:
        says = METHODS.get(name) or f"{variants[name]}."
        yield f"<div><dt>{swatches[name]}{name}</dt><dd>{escape(says)}</dd></div>"
    yield "</dl>"


def _swatches(comparison: Comparison) -> dict[str, str]:
    """Return a patch of each name's colour."""
    return {
        name: f'<span class="swatch" style="background:{look.colour}"></span>'
        for name, look in looks_of(comparison).items()
    }


def _table(sheet: Sheet) -> Iterator[str]:
    name = sheet.title.lower().replace(" ", "-")
    yield f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(sheet.title)}</h2>'
    yield f'<p class="note" id="{name}-note">{escape(sheet.note)}</p>'
    # a wide table scrolls in a box of its own; the keyboard must reach it
    yield f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
    yield f'<table aria-labelledby="{name}" aria-describedby="{name}-note"><thead><tr>'
    for place, header in enumerate(sheet.headers):
        yield f'<th scope="col"{_kind(place, sheet)}>{escape(header)}</th>'
    yield "</tr></thead><tbody>"
    for number, row in enumerate(sheet.rows):
        is_total = number >= len(sheet.rows) - sheet.num_totals
        yield '<tr class="total">' if is_total else "<tr>"
        for place, cell in enumerate(row):
            shown = escape(cell)
            if place == 0:
                yield f'<th scope="row">{shown}</th>'
                continue
            if place >= sheet.num_names:
                shown = shown.replace("-", "\N{MINUS SIGN}")
            yield f"<td{_kind(place, sheet)}>{shown}</td>"
        yield "</tr>"
    yield "</tbody></table></div></section>"


def _kind(place: int, sheet: Sheet) -> str:
    return "" if place < sheet.num_names else ' class="number"'


def _plots(plots: Sequence[Group], swatches: Mapping[str, str]) -> Iterator[str]:
    yield "<noscript><p>The plots need JavaScript; the words below each say what it shows.</p>"
    yield "</noscript>"
    number = 0
    for place, group in enumerate(plots):
        name = f"plots-{place}"
        yield f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(group.title)}</h2>'
        yield f'<p class="note">{escape(group.note)}</p>'
        if group.methods:
            marks = "".join(f"<li>{swatches[name]}{name}</li>" for name in group.methods)
            yield f'<ul class="legend" aria-label="Methods">{marks}</ul>'
        yield f'<div class="{"wide" if group.is_wide else "grid"}">'
        for figure in group.figures:
            yield from _figure(figure, number)
            number += 1
        yield "</div></section>"


def _figure(figure: Figure, number: int) -> Iterator[str]:
    yield f"<figure><h3>{escape(figure.title)}</h3>"
    yield f'<div class="plot" data-figure="{number}" role="img" aria-describedby="says-{number}" '
    yield f'aria-label="{escape(figure.title)}" style="height:{figure.layout["height"]}px"></div>'
    yield f'<figcaption id="says-{number}">{escape(figure.says)}</figcaption></figure>'
