"""What the command line draws: progress, tables, answers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipelines import report
from pipelines.stages import Progress as OnProgress

if TYPE_CHECKING:
    from pipelines.doctor import Finding

# a log is read later: a line now and then is enough
PLAIN_INTERVAL_S = 5.0
MOST_PROBABILITIES = 3
STATE_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@contextmanager
def progress(title: str, console: Console) -> Iterator[OnProgress]:
    """Yield a callback that draws a bar on a terminal, and writes a line now and then elsewhere."""
    if not console.is_terminal:
        yield _plain(title, console)
        return
    columns = (
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        handle = bar.add_task("", total=None, title=title, what="")

        def draw(what: str, done: int, total: int) -> None:
            bar.update(handle, what=what, completed=done, total=total)

        yield draw


def _plain(title: str, console: Console) -> OnProgress:
    last = 0.0

    def write(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PLAIN_INTERVAL_S:
            last = time.monotonic()
            console.print(f"{title}: {done}/{total} {what}", markup=False, highlight=False)

    return write


def results_table(rows: Sequence[report.Row]) -> Table:
    """Return the table that ends a run."""
    table = Table(title="Registered prompts", title_justify="left")
    for place, header in enumerate(report.HEADERS):
        table.add_column(header, justify="left" if place in (0, 1, 10) else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.cells()))
    return table


def findings_table(findings: Sequence["Finding"]) -> Table:
    """Return what `ptv2 doctor` found, a part for each section."""
    table = Table(title="ptv2 doctor", title_justify="left")
    for header in ("", "state"):
        table.add_column(header, no_wrap=True)
    # a digest is longer than a narrow terminal is wide; what is cut off cannot be copied
    table.add_column("found", overflow="fold")
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_section()
            table.add_row(Text(section, style="bold"))
        shown = Text(finding.value)
        if finding.hint:
            shown.append(f"\n{finding.hint}", style="dim")
        state = Text(finding.state, style=STATE_STYLES[finding.state])
        table.add_row(Text(f"  {finding.name}"), state, shown)
    return table


def answers_table(
    inputs: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> Table:
    """Return answers for people: label and probabilities, or tagged spans."""
    is_tagging = "spans" in answers[0]
    table = Table()
    for header in ("input", "spans") if is_tagging else ("input", "label", "probabilities"):
        table.add_column(header)
    for given, answer in zip(inputs, answers, strict=True):
        texts = [given.get("text") or " ".join(given.get("tokens", ())), given.get("text_pair")]
        shown = Text("\n".join(text for text in texts if text))
        if is_tagging:
            found = [f"{span['text']} = {span['type']}" for span in answer["spans"]]
            table.add_row(shown, Text("\n".join(found) or "none"))
        else:
            ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
            shares = [f"{label} {share:.3f}" for label, share in ranked[:MOST_PROBABILITIES]]
            table.add_row(shown, Text(answer["label"]), Text(", ".join(shares)))
    return table
