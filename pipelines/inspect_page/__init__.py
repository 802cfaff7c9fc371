"""An inspection as one HTML file that needs nothing else: no network, no script, no other file."""

from collections.abc import Iterator, Sequence
from html import escape

from pipelines.inspect_page.figures import FIGURES, colour, draw
from pipelines.inspect_report import HEADERS, cells
from pipelines.inspection import Inspection
from pipelines.page_shell import facts_list, shell, stylesheet, table

READING = (
    "Attention: share that tokens of dev give to the prompt, and the change since the start in "
    "points. Keys and values: their root mean square over that of the layer's own. Rank: the "
    "effective one, the prompt length at most. Moved: the change since the start over the norm of "
    "the prompt. Gradient: norm before clipping, first epoch to last."
)


def page(inspection: Inspection, explanation: Sequence[str]) -> str:
    """Return the whole inspection as one HTML page."""
    title = f"Prompt of {inspection.task}"
    body = [
        f"<header><h1>{escape(title)}</h1>",
        *_header(inspection, explanation),
        "</header>\n<main>",
        *_layers(inspection),
        *_plots(inspection),
        *_heads(inspection),
        "</main>",
    ]
    return shell(title, style=stylesheet("pipelines.inspect_page"), body=body)


def _header(inspection: Inspection, explanation: Sequence[str]) -> Iterator[str]:
    for note in inspection.missing:
        yield f'<p class="warning" role="note">{escape(note)}</p>'
    yield from facts_list(_facts(inspection))
    yield '<ul class="explanation" aria-label="What the figures say">'
    yield from (f"<li>{escape(sentence)}</li>" for sentence in explanation)
    yield "</ul>"


def _facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "backbone", inspection.backbone
    yield (
        "prompt",
        f"{inspection.prompt_length} positions in {len(inspection.layers)} of "
        f"{inspection.num_layers} layers",
    )
    if inspection.dev is not None:
        yield f"dev {inspection.metric}", f"{100 * inspection.dev:.1f}"
    if inspection.best_epoch is not None:
        ran = "" if inspection.epochs_run is None else f" of {inspection.epochs_run} that ran"
        yield "epoch of this prompt", f"{inspection.best_epoch}{ran}"
    measured = f"{inspection.rows} rows of dev" if inspection.rows else "nothing now"
    yield "measured on", measured


def _layers(inspection: Inspection) -> Iterator[str]:
    yield '<section aria-labelledby="layers"><h2 id="layers">Layer by layer</h2>'
    yield f'<p class="note">{escape(READING)}</p>'
    rows = [cells(row) for row in inspection.layers]
    yield from table("layers", HEADERS, rows)
    yield "</section>"


def _plots(inspection: Inspection) -> Iterator[str]:
    if not inspection.epochs:
        return
    yield '<section aria-labelledby="plots"><h2 id="plots">Over the training</h2>'
    yield '<p class="note">Epoch 0 is the start. The dashed line is the epoch of this prompt.</p>'
    yield '<ul class="legend" aria-label="Layers">'
    for place, row in enumerate(inspection.layers):
        chip = f"background: {colour(place, len(inspection.layers))}"
        yield f'<li><span class="swatch" style="{chip}"></span>layer {row.layer}</li>'
    yield '</ul><div class="grid">'
    for figure in FIGURES:
        drawn = draw(figure, inspection)
        if drawn is not None:
            yield f"<figure><h3>{escape(figure.title)}</h3>{drawn}"
            yield f"<figcaption>{escape(figure.says)}</figcaption></figure>"
    yield "</div></section>"


def _heads(inspection: Inspection) -> Iterator[str]:
    if not inspection.rows:
        return
    yield '<section aria-labelledby="heads"><h2 id="heads">Attention by layer and head</h2>'
    yield '<p class="note">Share of the tokens\' attention that goes to the prompt, in percent.</p>'
    count = len(inspection.layers[0].head_attention)
    shares = [row.head_attention for row in inspection.layers]
    rows = [
        (str(row.layer), *(f"{100 * share:.0f}" for share in row.head_attention))
        for row in inspection.layers
    ]
    headers = ["layer", *(f"head {n}" for n in range(count))]
    yield from table("heads", headers, rows, shades=shares)
    yield "</section>"
