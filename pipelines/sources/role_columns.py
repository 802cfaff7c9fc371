"""Semantic roles in columns: one for each predicate, behind one that names the predicates.

The last columns hold the roles, in IOB2 (`B-A0`, `I-A0`, `O`) or in the brackets of CoNLL-05
(`(A0*`, `*`, `*)`). Which columns those are is read off the whole file. Files of CoNLL-2012, which
begin with `#begin document`, have columns of their own.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.sources import Record
from pipelines.sources.propositions import (
    NO_PREDICATE,
    Line,
    Proposition,
    proposition_records,
    sentences,
)
from pipelines.sources.readers import Outcome, text_lines

IOB = re.compile(r"O|[BI]-\S+")
BRACKETS = re.compile(r"(?:\([^()*\s]+)*\*\)*")
BLANKS = r"[ \t]+"
NONE = ("-", "_")
DOCUMENT = "#begin document"
COMMENT = ("#begin document", "#end document")


class Layout(NamedTuple):
    """Which column holds what; `end` is counted from the last, None takes all."""

    token: int
    roleset: int | None
    first: int
    end: int | None
    is_brackets: bool


CONLL_2012 = Layout(token=3, roleset=7, first=11, end=-1, is_brackets=True)


def read_role_columns(path: Path, shown: str, token_column: int = 0) -> Outcome:
    """Read a record a predicate: tokens, predicate (a place from 0), tags (IOB2) and roleset.

    Args:
        path: The file.
        shown: The name of the file in places and problems.
        token_column: The column of the words; CoNLL-2012 has a fixed one.
    """
    problems: list[str] = []
    lines = list(text_lines(path, shown, problems))
    is_2012 = any(line.startswith(DOCUMENT) for _, line in lines)
    blocks = list(sentences(iter(lines), comment=COMMENT, divider=BLANKS))
    layout = CONLL_2012 if is_2012 else _layout(blocks, token_column)
    if layout is None:
        problems += [wrong for words in blocks if (wrong := _ragged(words, shown))]
        if blocks and not problems:
            expected = "columns of roles at the end of a line such as B-A0 and O, or (A0* and *)"
            problems.append(f"{shown}:{blocks[0][0].number}: expected {expected}, found none")
        return Outcome([], problems)
    records: list[Record] = []
    without = 0
    for words in blocks:
        try:
            found = _propositions(words, layout, shown)
        except ValueError as error:
            problems.append(str(error))
            continue
        without += not found
        records += proposition_records(words, found, shown, token_column=layout.token)
    return Outcome(records, problems, {NO_PREDICATE: without} if without else {})


def _layout(blocks: Sequence[Sequence[Line]], token_column: int) -> Layout | None:
    """Return the columns that most sentences have, None where no sentence has roles."""
    votes: Counter[tuple[int, bool]] = Counter()
    for words in blocks:
        if _ragged(words, ""):
            continue
        width = len(words[0].cells)
        for is_brackets, pattern in ((False, IOB), (True, BRACKETS)):
            first = width
            while first > token_column + 1 and all(
                pattern.fullmatch(word.cells[first - 1]) for word in words
            ):
                first -= 1
            if first < width:
                votes[first, is_brackets] += 1
    if not votes:
        return None
    first, is_brackets = votes.most_common(1)[0][0]
    roleset = first - 1 if first - 1 > token_column else None
    return Layout(token_column, roleset, first, None, is_brackets)


def _propositions(words: Sequence[Line], layout: Layout, shown: str) -> list[Proposition]:
    """Return the predicates of a sentence.

    Raises:
        ValueError: A line has another width, a cell is no role, or a predicate is not marked.
    """
    problem = _ragged(words, shown)
    if problem:
        raise ValueError(problem)
    width = len(words[0].cells)
    if width <= layout.token:
        raise ValueError(
            f"{shown}:{words[0].number}: expected the word in column {layout.token + 1}, "
            f"got {width} columns"
        )
    if width < layout.first:
        # some files leave out the column of rolesets where a sentence has none
        return []
    rows = [word.cells[layout.first : layout.end] for word in words]
    columns = [list(column) for column in zip(*rows, strict=True)]
    marked = None if layout.roleset is None else _marked(words, layout.roleset)
    # CoNLL-2012 names the senses of words that it gives no roles
    if marked is not None and len(marked) != len(columns) and layout is not CONLL_2012:
        raise ValueError(
            f"{shown}:{words[0].number}: expected one column of roles for each of {len(marked)} "
            f"marked predicates, got {len(columns)} in this sentence"
        )
    read: Callable[[Sequence[Line], list[str], str], list[str]]
    read = _from_brackets if layout.is_brackets else _from_iob
    found = []
    for place, cells in enumerate(columns):
        tags = read(words, cells, shown)
        verbs = [at for at, tag in enumerate(tags) if tag[2:] == "V"]
        if not verbs:
            raise ValueError(
                f"{shown}:{words[0].number}: column {layout.first + place + 1} of this sentence "
                "has no V; mark the predicate in it"
            )
        is_counted = marked is not None and len(marked) == len(columns)
        predicate = marked[place] if marked is not None and is_counted else verbs[0]
        roleset = None if layout.roleset is None else words[predicate].cells[layout.roleset]
        found.append(Proposition(predicate, None if roleset in NONE else roleset, tags))
    return found


def _ragged(words: Sequence[Line], shown: str) -> str | None:
    """Say which line of a sentence has not as many columns as its first."""
    width = len(words[0].cells)
    for word in words:
        if len(word.cells) != width:
            expected = f"expected {width} columns, as on line {words[0].number}"
            return f"{shown}:{word.number}: {expected}, got {len(word.cells)}"
    return None


def _marked(words: Sequence[Line], column: int) -> list[int]:
    return [place for place, word in enumerate(words) if word.cells[column] not in NONE]


def _from_iob(words: Sequence[Line], cells: list[str], shown: str) -> list[str]:
    for word, cell in zip(words, cells, strict=True):
        if not IOB.fullmatch(cell):
            raise ValueError(
                f"{shown}:{word.number}: expected a role such as B-A0, I-A0 or O, got {cell!r}"
            )
    return cells


def _from_brackets(words: Sequence[Line], cells: list[str], shown: str) -> list[str]:
    """Turn `(A0*`, `*`, `*)` into `B-A0`, `I-A0`, `I-A0`."""
    tags = []
    role: str | None = None
    for word, cell in zip(words, cells, strict=True):
        opened = re.findall(r"\(([^()*]+)", cell)
        is_wrong = not BRACKETS.fullmatch(cell) or len(opened) > 1 or (opened and role)
        role = opened[0] if opened else role
        closed = cell.count(")")
        if is_wrong or closed > (role is not None):
            raise ValueError(
                f"{shown}:{word.number}: expected brackets that are opened once and closed once, "
                f"such as (A0* and *), got {cell!r}"
            )
        tags.append(f"{'B' if opened else 'I'}-{role}" if role else "O")
        role = None if closed else role
    if role:
        raise ValueError(f"{shown}:{words[-1].number}: the bracket of {role} is not closed")
    return tags
