"""What all pages share: one HTML file that needs nothing else, its style, its tables."""

import base64
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# of the colour behind a cell; darker would hide its number
STRONGEST = 0.7


def shell(
    title: str,
    *,
    style: str,
    body: Iterable[str],
    scripts: Sequence[str] = (),
    data: str = "",
) -> str:
    """Return a page whose policy lets no request out, and runs no script but those in it.

    Args:
        title: Of the page, as text.
        style: Style sheets.
        body: HTML, line by line.
        scripts: Run at the end, in their order.
        data: JSON that the scripts find as `figures`; nothing in it may end a script.
    """
    policy = POLICY
    if scripts:
        policy += f"; img-src data:; script-src {' '.join(map(_digest, scripts))}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}</style></head>",
            "<body>",
            *body,
            *([f'<script type="application/json" id="figures">{data}</script>'] if data else []),
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def stylesheet(package: str | None = None) -> str:
    """Return the style of all pages, and what a page's own package adds to it."""
    packages = (__name__,) if package is None else (__name__, package)
    return "".join(resource(one, "page.css") for one in packages)


def resource(package: str, name: str) -> str:
    """Return the text of a file that lies in a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def facts_list(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a list of names and values."""
    yield '<dl class="facts">'
    for name, value in facts:
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    yield "</dl>"


def table(
    name: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: Collection[int] = (),
    described: bool = False,
    strong: Collection[int] = (),
    shades: Sequence[Sequence[float]] | None = None,
) -> Iterator[str]:
    """Yield a table whose first column names its rows.

    Args:
        name: The id of the heading above it.
        headers: Of the columns.
        rows: Texts.
        texts: Columns that are text, from 0; the others are numbers.
        described: Whether a note with the id `NAME-note` says how to read it.
        strong: Rows that stand out, from 0.
        shades: How dark each cell but the first is, from 0 to 1; None leaves them plain.
    """
    kinds = ["" if place in texts else ' class="number"' for place in range(len(headers))]
    note = f' aria-describedby="{name}-note"' if described else ""
    # a wide table scrolls in a box of its own; the keyboard must reach it
    yield f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
    yield f'<table aria-labelledby="{name}"{note}><thead><tr>'
    for kind, header in zip(kinds, headers, strict=True):
        yield f'<th scope="col"{kind}>{escape(header)}</th>'
    yield "</tr></thead><tbody>"
    for number, (head, *others) in enumerate(rows):
        yield '<tr class="total">' if number in strong else "<tr>"
        yield f'<th scope="row"{kinds[0]}>{escape(head)}</th>'
        for place, cell in enumerate(others, start=1):
            shade = "" if shades is None else _shade(shades[number][place - 1])
            shown = escape(cell) if place in texts else _number(cell)
            yield f"<td{kinds[place]}{shade}>{shown}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"


def blend(ramp: Sequence[tuple[int, int, int]], share: float) -> str:
    """Return the colour that lies at a share of a ramp, from 0 to 1."""
    at = share * (len(ramp) - 1)
    below = min(int(at), len(ramp) - 2)
    mixed = (
        round(low + (high - low) * (at - below))
        for low, high in zip(ramp[below], ramp[below + 1], strict=True)
    )
    return f"#{''.join(f'{part:02x}' for part in mixed)}"


def _digest(script: str) -> str:
    """Return what a policy calls a script that stands in the page."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _number(cell: str) -> str:
    shown = escape(cell.replace("->", "\N{RIGHTWARDS ARROW}"))
    return shown.replace("-", "\N{MINUS SIGN}")


def _shade(share: float) -> str:
    return f' style="background: rgb(59 127 240 / {STRONGEST * share:.2f})"'
