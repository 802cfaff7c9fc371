"""A comparison in words and tables: for the terminal and as Markdown. The page takes both."""

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from pipelines.compare_data import Comparison
from pipelines.compare_sheets import main_sheet, sheets
from pipelines.compare_stats import Summary
from pipelines.compare_windows import summarise_windows
from pipelines.compare_words import ABSENT, CLEAR, share, variant_text, wide
from pipelines.tables import markdown_rows, markdown_text

MOST_NAME_WIDTH = 24


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what was compared, when, where and how, by name."""
    trials = ", ".join(
        f"{method} {comparison.num_trials.get(method, 0)}" for method in comparison.methods
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    millions = comparison.backbone_parameters / 1e6
    return [
        (
            "Backbone",
            f"{comparison.backbone}, {millions:.1f} million parameters, "
            f"{comparison.backbone_layers} layers",
        ),
        ("Hyper-parameters chosen on", comparison.chosen_on),
        ("Search trials for each task", trials),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Machine", comparison.machine),
        ("Date", comparison.date),
        ("Code", comparison.git_commit or "not in a repository"),
        ("Versions", versions or ABSENT),
        ("Results", comparison.results),
    ]


def missing_note(summary: Summary) -> str | None:
    """Return what has not finished, if anything has not."""
    if not summary.missing:
        return None
    parts = [
        f"{task} {method} (seed {', '.join(map(str, seeds))})"
        for task, method, seeds in summary.missing
    ]
    return (
        f"Not finished: {'; '.join(parts)}. The average is over the tasks that all methods "
        f"finished for all seeds: {', '.join(summary.complete_tasks) or 'none'}."
    )


def table(comparison: Comparison, summary: Summary) -> Table:
    """Return the main table for a terminal; four methods take less than 140 columns."""
    sheet = main_sheet(comparison, summary)
    shown = Table(
        title=Text(f"{comparison.backbone}: test scores, mean ± sd over seeds"),
        title_justify="left",
        caption=Text("\n".join(("", *_footer(comparison, summary)))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for place, header in enumerate(sheet.headers):
        is_name = place < sheet.num_names
        # on a narrow terminal the widest columns take two lines or three, and nothing is cut
        shown.add_column(
            Text(header),
            justify="left" if is_name else "right",
            overflow="fold",
            max_width=MOST_NAME_WIDTH if is_name else None,
        )
    for place, row in enumerate(sheet.rows):
        if sheet.num_totals and place == len(sheet.rows) - sheet.num_totals:
            shown.add_section()
        # so that a line breaks before the sign, not after it
        shown.add_row(*(Text(cell.replace("± ", "±")) for cell in row))
    return shown


def markdown(comparison: Comparison, summary: Summary) -> str:
    """Return the whole comparison as Markdown."""
    lines = [f"# Comparison on {markdown_text(comparison.backbone)}", ""]
    lines += [f"- {name}: {markdown_text(value)}" for name, value in facts(comparison)]
    if note := missing_note(summary):
        lines += ["", f"**{markdown_text(note)}**"]
    for sheet in sheets(comparison, summary):
        rows = markdown_rows(sheet.headers, sheet.rows, num_names=sheet.num_names)
        lines += ["", f"## {sheet.title}", "", markdown_text(sheet.note), "", *rows]
    return "\n".join(lines) + "\n"


def _footer(comparison: Comparison, summary: Summary) -> Iterator[str]:
    known = dict(facts(comparison))
    if comparison.subject is not None and comparison.first_of("finetune") is not None:
        yield f"{CLEAR} the 95 % interval of the difference excludes 0 (paired bootstrap over test)"
    if note := missing_note(summary):
        yield note
    for variant in comparison.variants:
        yield f"{variant.name}: {variant_text(variant)}"
    windows = summarise_windows(comparison, summary)
    if windows is not None and comparison.window is not None:
        factor = comparison.window.factor
        means = ", ".join(
            f"{one.method} {wide(one.share, factor)} ({share(one.share)} %)"
            for one in windows.averages
        )
        yield f"Learning-rate window, of x{factor:g} (mean over tasks): {means}"
    for name in ("Hyper-parameters chosen on", "Search trials for each task", "Seeds", "Results"):
        yield f"{name}: {known[name]}"
