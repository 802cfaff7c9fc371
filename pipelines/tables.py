"""Tables as CSV and as Markdown text."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a header and rows as CSV with Unix line ends."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def markdown_rows(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, num_names: int
) -> Iterator[str]:
    """Yield the lines of a Markdown table; the first `num_names` columns are text."""
    ruler = ["---"] * num_names + ["--:"] * (len(headers) - num_names)
    for cells in (headers, ruler, *rows):
        yield f"| {' | '.join(map(markdown_text, cells))} |"


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line of a table."""
    for character in "\\`*|<[":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
