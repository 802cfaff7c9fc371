"""A finished sweep as files that people open: one page, its plots as PNG, its figures as JSON."""

from pathlib import Path

from pipelines.study_page import page
from pipelines.study_plots import write_png
from pipelines.study_report import to_json
from pipelines.sweep.record import SweepRecord
from ptv2_core.files import write_json_atomic, write_text_atomic

PAGE = "study.html"


def write_study(record: SweepRecord, folder: Path) -> list[Path]:
    """Write `study.html` and the plots into a folder; returns the files, the page first."""
    return [_write_page(record, folder / PAGE), *write_png(record, folder)]


def write_chosen(
    record: SweepRecord,
    folder: Path,
    html_file: Path | None = None,
    png_folder: Path | None = None,
    json_file: Path | None = None,
) -> dict[str, str]:
    """Write the page, the plots and, where asked for, the figures.

    Args:
        record: The sweep.
        folder: For what has no place of its own.
        html_file: Of the page.
        png_folder: Of the plots.
        json_file: Of the figures; None writes none.

    Returns:
        What was written and where, for people.
    """
    file = _write_page(record, html_file or folder / PAGE)
    plots = write_png(record, png_folder or folder)
    said = {
        "page": f"{file} (open it in a browser)",
        "plots": f"{plots[0].parent}: {', '.join(one.name for one in plots)}",
    }
    if json_file is not None:
        write_json_atomic(json_file, to_json(record))
        said["figures"] = str(json_file)
    return said


def _write_page(record: SweepRecord, file: Path) -> Path:
    write_text_atomic(file, page(record))
    return file
