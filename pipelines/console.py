"""What the command line draws: progress, tables, answers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipelines import report
from pipelines.stages import Progress as OnProgress

if TYPE_CHECKING:
    from pipelines.doctor import Finding
    from pipelines.inspection import Inspection
    from pipelines.multitask import Shared
    from pipelines.number_formats import FormatComparison

# a log is read later: a line now and then is enough
PLAIN_INTERVAL_S = 5.0
MOST_PROBABILITIES = 3
# of an input's field that has a name; a whole passage would fill the screen
MOST_CHARACTERS = 200
# fields that need no name
UNNAMED = ("text", "text_pair", "tokens")
STATE_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
# the first characters of a line of a unified diff, the longer ones first
DIFF_STYLES = {"---": "bold", "+++": "bold", "@@": "cyan", "-": "red", "+": "green"}


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
    for header in report.HEADERS:
        table.add_column(header, justify="left" if header in report.LEFT else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.cells()))
    return table


def shared_table(name: str, parts: Sequence["Shared"]) -> Table:
    """Return the table that ends the training of a shared prompt."""
    table = Table(title=f"Shared prompt {name}", title_justify="left")
    for place, header in enumerate(("task", "metric", "share", "dev", "test", "prompt")):
        table.add_column(header, justify="left" if place in (0, 1, 5) else "right")
    for part in parts:
        scores = (f"{100 * part.share:.0f} %", f"{100 * part.dev:.1f}", f"{100 * part.test:.1f}")
        table.add_row(*(Text(cell) for cell in (part.task, part.metric, *scores, part.prompt)))
    return table


def formats_table(found: "FormatComparison") -> Table:
    """Return what `ptv2 evaluate --compare` found."""
    title = f"{found.task}, {found.split}: {found.decisions} decisions on {found.device}"
    table = Table(title=title, title_justify="left")
    headers = ("precision", "computed in", found.metric, "points", "changed", "MB", "rows/s")
    for place, header in enumerate(headers):
        table.add_column(header, justify="left" if place < 2 else "right")
    for one in found.formats:
        is_reference = one is found.formats[0]
        changed = f"{one.mean_change:.3g} each" if one.changed is None else str(one.changed)
        table.add_row(
            one.precision,
            one.number_format,
            f"{one.score:.4f}",
            "" if is_reference else f"{one.points:+.2f}",
            "" if is_reference else changed,
            f"{one.size_bytes / 1e6:.1f}",
            f"{one.rows_per_s:,.0f}",
        )
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


def layers_table(inspection: "Inspection") -> Table:
    """Return a row for each layer with a prompt, as `ptv2 inspect` shows it."""
    from pipelines.inspect_report import HEADERS, cells

    title = f"Prompt of {inspection.task}, {inspection.prompt_length} positions"
    table = Table(title=title, title_justify="left")
    for header in HEADERS:
        table.add_column(header, justify="right")
    for row in inspection.layers:
        table.add_row(*(Text(cell) for cell in cells(row)))
    return table


def diff_text(lines: Sequence[str]) -> Text:
    """Return a unified diff, coloured where the console is a terminal."""
    shown = Text()
    for place, line in enumerate(lines):
        style = next((DIFF_STYLES[mark] for mark in DIFF_STYLES if line.startswith(mark)), "")
        shown.append("\n" * (place > 0))
        shown.append(line, style=style)
    return shown


def answers_table(
    inputs: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> Table:
    """Return answers for people: what was asked, and what the prompt says."""
    table = Table()
    for header in ("input", *_cells(answers[0])):
        table.add_column(header)
    for given, answer in zip(inputs, answers, strict=True):
        table.add_row(_shown(given), *(Text(cell) for cell in _cells(answer).values()))
    return table


def _cells(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return what a table shows of an answer, by its headers."""
    if "spans" in answer:
        found = [f"{span['text']} = {span['type']}" for span in answer["spans"]]
        return {"spans": "\n".join(found) or "none"}
    if "value" in answer:
        return {"value": f"{answer['value']:.4f}"}
    if "n_best" in answer:
        is_found = answer["start"] is not None
        return {
            "answer": answer["text"] or "none",
            "characters": f"{answer['start']} to {answer['end']}" if is_found else "",
            "score": f"{answer['score']:.3f}",
        }
    if "choice" in answer:
        pairs = list(zip(answer["options"], answer["probabilities"], strict=True))
        return {"choice": answer["text"], "probabilities": _ranked(pairs)}
    shares = list(answer["probabilities"].items())
    return {"label": answer["label"], "probabilities": _ranked(shares)}


def _ranked(pairs: Sequence[tuple[str, float]]) -> str:
    ranked = sorted(pairs, key=lambda pair: -pair[1])[:MOST_PROBABILITIES]
    return ", ".join(f"{name} {share:.3f}" for name, share in ranked)


def _shown(given: Mapping[str, Any]) -> Text:
    """Return an input: texts and tokens as they are, other fields with their names."""
    lines = []
    for key, value in given.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = (" " if key == "tokens" else " | ").join(map(str, value))
        name = "" if key in UNNAMED else f"{key}: "
        shown = shorten(str(value), MOST_CHARACTERS, placeholder=" ...") if name else str(value)
        lines.append(f"{name}{shown}")
    return Text("\n".join(lines))
