"""File formats: one function a format, from a file to records that know their line.

Every function collects the problems of the whole file instead of stopping at the first one. Where
a record came from is written as the file and the line it starts at (for Parquet: the row).
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pipelines.sources import Record
from pipelines.sources.values import json_value

BOM = b"\xef\xbb\xbf"


class ColumnChoice(NamedTuple):
    """The columns of a CoNLL file that hold the token and its tag; -1 is the last."""

    token: int = 0
    tag: int = -1


class Outcome(NamedTuple):
    """What a file holds: its good records and, one line each, its problems.

    What gives no record though nothing is wrong with it is counted under `skipped`, in words.
    """

    records: list[Record]
    problems: list[str]
    skipped: Mapping[str, int] = MappingProxyType({})


def read_jsonl(path: Path, shown: str) -> Outcome:
    """Read one JSON object a line; empty lines are skipped.

    Args:
        path: The file.
        shown: The name of the file in places and problems.
    """
    records: list[Record] = []
    problems: list[str] = []
    for number, line in text_lines(path, shown, problems):
        if not line.strip():
            continue
        where = f"{shown}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
        except json.JSONDecodeError as error:
            problems.append(f"{where}, column {error.colno}: not valid JSON: {error.msg}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not usable JSON: {error}")
        else:
            if not isinstance(value, dict):
                got = f"got {_json_kind(value)}"
                problems.append(f"{where}: expected a JSON object on each line, {got}")
            elif "\\u" in line and not is_encodable(value):
                problems.append(f"{where}: holds half of a surrogate pair, which is no character")
            else:
                records.append((where, value))
    return Outcome(records, problems)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping for `json.loads`; a key that is there twice is a ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def refuse_constant(name: str) -> None:
    """Refuse NaN and the infinities for `json.loads`."""
    raise ValueError(f"{name} is not JSON; write null")


def is_encodable(value: Any) -> bool:
    """Tell whether all texts in a value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def read_csv(path: Path, shown: str) -> Outcome:
    """Read comma separated values with a header line (RFC 4180); every value is text."""
    return _read_table(path, shown, csv.reader, delimiter=",", strict=True)


def read_tsv(path: Path, shown: str) -> Outcome:
    """Read tab separated values with a header line; quotes are plain characters, as in GLUE."""
    return _read_table(path, shown, csv.reader, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, shown: str, reader: Callable[..., Any], **dialect: Any) -> Outcome:
    problems: list[str] = []
    records: list[Record] = []
    lines = [line for _, line in text_lines(path, shown, problems)]
    if problems:
        return Outcome([], problems)
    rows = reader((f"{line}\n" for line in lines), **dialect)
    header: list[str] | None = None
    start = 1
    try:
        for row in rows:
            where = f"{shown}:{start}"
            start = rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                twice = sorted({name for name in row if row.count(name) > 1})
                if twice:
                    return Outcome([], [f"{where}: the header has {twice[0]!r} twice"])
            elif len(row) != len(header):
                expected = f"expected {len(header)} fields, as in the header, got {len(row)}"
                problems.append(f"{where}: {expected}")
            else:
                records.append((where, dict(zip(header, row, strict=True))))
    except csv.Error as error:
        problems.append(f"{shown}:{start}: {error}; is a quote left open in this row?")
    return Outcome(records, problems)


def read_parquet(path: Path, shown: str) -> Outcome:
    """Read a Parquet file; dates and decimals become text, NaN becomes null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        return Outcome([], [f"{shown}: not a readable Parquet file: {reason}"])
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return Outcome([], [f"{shown}: the column {twice[0]!r} is there twice"])
    records: list[Record] = []
    problems: list[str] = []
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            where = f"{shown}:{number}"
            try:
                records.append((where, json_value(row)))
            except TypeError as error:
                problems.append(f"{where}: holds {error}, which JSON cannot; drop that column")
    return Outcome(records, problems)


def read_conll(path: Path, shown: str, columns: ColumnChoice) -> Outcome:
    """Read columns, one token a line and an empty line between sentences.

    Columns are separated by blanks or tabs; `-DOCSTART-` lines are skipped. A record is
    `{"tokens": [...], "tags": [...]}`.
    """
    records: list[Record] = []
    problems: list[str] = []
    tokens: list[str] = []
    tags: list[str] = []
    width = 0
    start = 0
    for number, line in [*text_lines(path, shown, problems), (0, "")]:
        cells = [cell for cell in re.split(r"[ \t]+", line.rstrip("\r")) if cell]
        if not cells or cells[0] == "-DOCSTART-":
            if tokens:
                records.append((f"{shown}:{start}", {"tokens": tokens, "tags": tags}))
                tokens, tags = [], []
            continue
        width = width or len(cells)
        wrong = _column_problem(len(cells), width, columns)
        if wrong:
            problems.append(f"{shown}:{number}: {wrong}")
            continue
        start = start if tokens else number
        tokens.append(cells[columns.token])
        tags.append(cells[columns.tag])
    return Outcome(records, problems)


def _column_problem(got: int, width: int, columns: ColumnChoice) -> str | None:
    if got != width:
        return f"expected {width} columns, as on the first line, got {got}"
    for name, column in (("token_column", columns.token), ("tag_column", columns.tag)):
        if not -got <= column < got:
            return f"expected a column {column} ({name}), got {got} columns"
    if columns.token % got == columns.tag % got:
        return f"expected the token and its tag in different columns, got {got} in all"
    return None


def text_lines(path: Path, shown: str, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, numbered from 1; lines that are not UTF-8 are problems."""
    raw = path.read_bytes().removeprefix(BOM)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        problems.append(f"{shown}: expected UTF-8, got what looks like UTF-16; save it as UTF-8")
        return
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            yield number, line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
            problems.append(f"{shown}:{number}: expected UTF-8, but {byte}")
