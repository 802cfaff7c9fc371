"""A comparison as one HTML file that needs nothing else: no network, no other file."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from pipelines.compare_data import Comparison
from pipelines.compare_page.figures import Group, groups
from pipelines.compare_page.looks import looks_of
from pipelines.compare_page.window_figures import window_groups
from pipelines.compare_report import facts, missing_note
from pipelines.compare_sheets import Sheet, sheets
from pipelines.compare_stats import Summary
from pipelines.compare_words import variant_text
from pipelines.page_shell import facts_list, shell, stylesheet, table
from pipelines.page_shell.plots import NO_SCRIPT, plot, plot_data, plot_scripts

METHODS = {
    "probe": "the backbone stays as it is; only the head is tuned.",
    "prompt_tuning": "a prompt at the input layer alone, and the head; the backbone is frozen.",
    "ptv2": "P-Tuning v2: a prompt in every layer, and the head; the backbone is frozen.",
    "finetune": "every parameter of the backbone, and the head.",
}


def page(comparison: Comparison, summary: Summary) -> str:
    """Return the whole comparison as one HTML page."""
    first, *others = sheets(comparison, summary)
    plots = [*groups(comparison, summary), *window_groups(comparison, summary)]
    title = f"Comparison on {comparison.backbone}"
    body = [
        f"<header><h1>{escape(title)}</h1>",
        *_header(comparison, summary),
        "</header>\n<main>",
        *_table(first),
        *_plots(plots, _swatches(comparison)),
        *(line for sheet in others for line in _table(sheet)),
        "</main>",
    ]
    figures = [figure for group in plots for figure in group.figures]
    return shell(
        title,
        style=stylesheet(),
        body=body,
        scripts=plot_scripts(),
        data=plot_data(figures),
    )


def _header(comparison: Comparison, summary: Summary) -> Iterator[str]:
    if note := missing_note(summary):
        yield f'<p class="warning" role="note">{escape(note)}</p>'
    yield from facts_list(facts(comparison))
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
    totals = range(len(sheet.rows) - sheet.num_totals, len(sheet.rows))
    yield from table(
        name,
        sheet.headers,
        sheet.rows,
        texts=range(sheet.num_names),
        described=True,
        strong=totals,
    )
    yield "</section>"


def _plots(plots: Sequence[Group], swatches: Mapping[str, str]) -> Iterator[str]:
    yield NO_SCRIPT
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
            yield from plot(figure, number)
            number += 1
        yield "</div></section>"
