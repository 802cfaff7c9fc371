"""A finished sweep as one HTML file that needs nothing else: no network, no other file."""

from collections.abc import Iterator, Sequence
from html import escape

from pipelines.page_shell import facts_list, shell, stylesheet, table
from pipelines.page_shell.plots import NO_SCRIPT, Figure, plot, plot_data, plot_scripts
from pipelines.study_page.figures import PARALLEL_TITLE, figures
from pipelines.study_report import (
    FINALIST_HEADERS,
    facts,
    finalist_rows,
    sentences,
    trial_headers,
    trial_rows,
    trial_texts,
)
from pipelines.sweep.record import SweepRecord

FINALISTS_NOTE = (
    "The best trials, trained again with further seeds where there is more than one. The winner "
    "has the highest mean minus spread; the spread is the standard deviation over the seeds."
)
TRIALS_NOTE = (
    "Complete trials first, the best at the top. The score is the best over a trial's epochs; a "
    "pruned trial has that of the epochs it was given. Time counts from start to end."
)


def page(record: SweepRecord) -> str:
    """Return the whole sweep as one HTML page."""
    title = f"Sweep of {record.task}"
    drawn, missing = figures(record)
    body = [
        f"<header><h1>{escape(title)}</h1>",
        '<ul class="explanation" aria-label="What the sweep found">',
        *(f"<li>{escape(sentence)}</li>" for sentence in sentences(record)),
        "</ul>",
        *facts_list(facts(record)),
        "</header>\n<main>",
        *_finalists(record),
        *_plots(drawn, missing),
        *_trials(record),
        "</main>",
    ]
    return shell(
        title,
        style=stylesheet("pipelines.study_page"),
        body=body,
        scripts=plot_scripts(),
        data=plot_data(drawn),
    )


def _finalists(record: SweepRecord) -> Iterator[str]:
    yield '<section aria-labelledby="finalists"><h2 id="finalists">Finalists</h2>'
    yield f'<p class="note" id="finalists-note">{escape(FINALISTS_NOTE)}</p>'
    yield from table(
        "finalists", FINALIST_HEADERS, finalist_rows(record), described=True, strong=(0,)
    )
    yield "</section>"


def _plots(drawn: Sequence[Figure], missing: Sequence[str]) -> Iterator[str]:
    yield '<section aria-labelledby="plots"><h2 id="plots">How it went</h2>'
    yield NO_SCRIPT
    yield from (f'<p class="note">{escape(reason)}</p>' for reason in missing)
    yield '<div class="pair">'
    for number, figure in enumerate(drawn):
        if figure.title == PARALLEL_TITLE:
            # wider than a telephone; the keyboard must reach what lies beside
            yield '<div class="sideways" tabindex="0" role="region" '
            yield f'aria-label="{escape(figure.title)}">'
        else:
            yield "<div>"
        yield from plot(figure, number)
        yield "</div>"
    yield "</div></section>"


def _trials(record: SweepRecord) -> Iterator[str]:
    rows = trial_rows(record)
    winner = [place for place, row in enumerate(rows) if row[0] == str(record.winner.number)]
    yield '<section aria-labelledby="trials"><h2 id="trials">Trials</h2>'
    yield f'<p class="note" id="trials-note">{escape(TRIALS_NOTE)}</p>'
    yield from table(
        "trials",
        # a name of several words may take as many lines
        [header.replace("_", "_\u200b") for header in trial_headers(record)],
        rows,
        texts=trial_texts(record),
        described=True,
        strong=winner,
    )
    yield "</section>"
