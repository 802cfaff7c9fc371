"""The tables as one SVG picture: a bar of tokens a second for each way, a line at the limit."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks import ours
from benchmarks.report import LIMIT, PEERS, Table

WIDTH, LABELS, MARGIN, ROW, GAP, HEAD = 980, 400, 20, 24, 28, 46
PEER, OWN, HEADLINE, INK, LINE = "#9aa5b1", "#7fb3d5", "#1f6fb2", "#1f2933", "#c0392b"


def svg(tables: Sequence[Table], machine: Mapping[str, Any]) -> str:
    """Return the picture of some tables, one below the other."""
    parts: list[str] = []
    top = MARGIN
    for table in tables:
        parts += _panel(table, top)
        top += HEAD + len(table.ways) * ROW + GAP
    note = (
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}; medians of "
        f"{len(tables[0].ways[0].rounds)} rounds, all ways in turn in one process"
    )
    parts.append(_text(MARGIN, top, note, size=11))
    height = top + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _panel(table: Table, top: int) -> list[str]:
    speeds = {way.key: table.num_tokens / way.seconds for way in table.ways}
    limit = table.num_tokens / table.limit_seconds
    # beyond the limit lie only the ways that leave work out
    scale = (WIDTH - LABELS - 2 * MARGIN - 150) / max(limit, *speeds.values())
    base = speeds.get(PEERS[0], next(iter(speeds.values())))
    parts = [
        _text(MARGIN, top + 14, f"{table.shape}: {table.origin}", size=15, bold=True),
        _text(MARGIN, top + 32, "tokens a second, times the first way's", size=11),
    ]
    start = top + HEAD
    figures: list[str] = []
    for place, way in enumerate(table.ways):
        middle = start + place * ROW
        long = max(1.0, speeds[way.key] * scale)
        colour = PEER if way.key in PEERS else OWN
        if way.key in (ours.ALL_LAYERS, ours.TOP_THIRD_CACHED):
            colour = HEADLINE
        said = f"{speeds[way.key]:,.0f}  ({speeds[way.key] / base:.1f}x)"
        parts += [
            _text(MARGIN + LABELS - 8, middle + 14, way.name, end=True),
            f'<rect x="{MARGIN + LABELS}" y="{middle + 2}" width="{long:.1f}" '
            f'height="{ROW - 7}" fill="{colour}"/>',
        ]
        figures.append(_text(MARGIN + LABELS + long + 6, middle + 14, said))
    place_of_limit = MARGIN + LABELS + limit * scale
    parts += [
        f'<line x1="{place_of_limit:.1f}" y1="{start - 6}" x2="{place_of_limit:.1f}" '
        f'y2="{start + len(table.ways) * ROW}" stroke="{LINE}" stroke-dasharray="4 3"/>',
        _text(place_of_limit, start - 10, f"{LIMIT} ({limit / base:.1f}x)", colour=LINE, end=True),
        *figures,
    ]
    return parts


def _text(
    left: float,
    base: float,
    words: str,
    *,
    size: int = 12,
    bold: bool = False,
    end: bool = False,
    colour: str = INK,
) -> str:
    extra = ' font-weight="bold"' if bold else ""
    extra += ' text-anchor="end"' if end else ""
    return (
        f'<text x="{left:.1f}" y="{base:.1f}" font-size="{size}" fill="{colour}"{extra} '
        f'paint-order="stroke" stroke="white" stroke-width="3">{escape(words)}</text>'
    )
