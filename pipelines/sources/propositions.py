"""Universal Propositions: CoNLL-U with a column of rolesets and one of roles a predicate.

A role stands at the head of its argument alone. The argument is what depends on that head, without
the branch that leads to the predicate; where it is in pieces, the piece that holds the head.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.sources import Record
from pipelines.sources.readers import Outcome, text_lines

NO_PREDICATE = "sentences without a predicate"
# columns of CoNLL-U, from 0; rolesets come after its ten, then the roles
ID, FORM, HEAD, ROLESET, ROLES = 0, 1, 6, 10, 11


class Line(NamedTuple):
    """The cells of one word, and its line in the file."""

    number: int
    cells: list[str]


class Proposition(NamedTuple):
    """A predicate of a sentence and its column of roles."""

    predicate: int
    roleset: str | None
    tags: list[str]


def read_conllu(path: Path, shown: str) -> Outcome:
    """Read a record a predicate: tokens, predicate (a place from 0), tags (IOB2) and roleset.

    Ranges of words (`1-2`) and empty nodes (`8.1`) are no words of their own.

    Args:
        path: The file.
        shown: The name of the file in places and problems.
    """
    problems: list[str] = []
    records: list[Record] = []
    without = 0
    for lines in sentences(text_lines(path, shown, problems), comment="#", divider=r"\t"):
        words = [line for line in lines if line.cells[ID].isdigit()]
        try:
            found = _propositions(words, shown) if words else []
        except ValueError as error:
            problems.append(str(error))
            continue
        without += bool(words and not found)
        records += proposition_records(words, found, shown, token_column=FORM)
    return Outcome(records, problems, {NO_PREDICATE: without} if without else {})


def sentences(
    lines: Iterator[tuple[int, str]], *, comment: str | tuple[str, ...], divider: str
) -> Iterator[list[Line]]:
    """Yield the words of each sentence; an empty line ends it.

    Args:
        lines: The lines of a file, numbered.
        comment: What a line begins with that is no word.
        divider: Of the cells, a regular expression.
    """
    found: list[Line] = []
    for number, line in lines:
        if line.startswith(comment):
            continue
        if line.strip():
            # files as published end the lines of some sentences with one divider too many
            found.append(Line(number, re.split(divider, line.strip(" \t"))))
        elif found:
            yield found
            found = []
    if found:
        yield found


def proposition_records(
    words: Sequence[Line], found: Sequence[Proposition], shown: str, *, token_column: int
) -> list[Record]:
    """Return a record a predicate, whose place is the line of its word."""
    tokens = [word.cells[token_column] for word in words]
    return [
        (
            f"{shown}:{words[one.predicate].number}",
            {
                "tokens": tokens,
                "predicate": one.predicate,
                "tags": one.tags,
                "roleset": one.roleset,
            },
        )
        for one in found
    ]


def _propositions(words: Sequence[Line], shown: str) -> list[Proposition]:
    """Return the predicates of a sentence.

    Raises:
        ValueError: A line has another width, a head is no word, or a predicate is not marked.
    """
    width = len(words[0].cells)
    if width < ROLESET:
        raise ValueError(
            f"{shown}:{words[0].number}: expected {ROLESET} columns or more, divided by tabs, as "
            f"CoNLL-U has, got {width}"
        )
    for word in words:
        if len(word.cells) != width:
            raise ValueError(
                f"{shown}:{word.number}: expected {width} columns, as on line {words[0].number}, "
                f"got {len(word.cells)}"
            )
    if width == ROLESET:
        # files as published leave out the column of rolesets where a sentence has none
        return []
    predicates = [place for place, word in enumerate(words) if word.cells[ROLESET] != "_"]
    if len(predicates) != width - ROLES:
        raise ValueError(
            f"{shown}:{words[0].number}: expected one column of roles for each of "
            f"{len(predicates)} words with a roleset, got {width - ROLES} in this sentence"
        )
    heads = _heads(words, shown)
    found = []
    for column, predicate in enumerate(predicates, start=ROLES):
        cells = [word.cells[column] for word in words]
        roles = {place: role for place, role in enumerate(cells) if role != "_"}
        if "V" not in roles.values():
            word = words[predicate]
            raise ValueError(
                f"{shown}:{word.number}: column {column + 1}, of the predicate {word.cells[FORM]!r}"
                f" ({word.cells[ROLESET]}), has no V; mark the predicate in it"
            )
        tags = spans_of(heads, roles, predicate)
        found.append(Proposition(predicate, words[predicate].cells[ROLESET], tags))
    return found


def _heads(words: Sequence[Line], shown: str) -> list[int | None]:
    """Return the place of each word's head, None for a root."""
    places = {word.cells[ID]: place for place, word in enumerate(words)}
    heads: list[int | None] = []
    for word in words:
        head = word.cells[HEAD]
        if head not in places and head != "0":
            raise ValueError(
                f"{shown}:{word.number}: expected the number of a word or 0 as the head, "
                f"got {head!r}"
            )
        heads.append(places.get(head))
    return heads


def spans_of(heads: Sequence[int | None], roles: Mapping[int, str], predicate: int) -> list[str]:
    """Return the IOB2 tags of a predicate whose roles stand at the heads of its arguments.

    Args:
        heads: The place of each word's head, None for a root.
        roles: The role at a place.
        predicate: Its place.
    """
    # a second part of the predicate has words below it as an argument has
    arguments = set(roles) - {predicate}
    way = _way_up(heads, predicate, arguments)
    owners = [_owner(heads, place, arguments, way) for place in range(len(heads))]
    tags = ["O"] * len(heads)
    for place, role in roles.items():
        first = last = place
        if place in arguments:
            while first > 0 and owners[first - 1] == place:
                first -= 1
            while last + 1 < len(heads) and owners[last + 1] == place:
                last += 1
        tags[first : last + 1] = [f"B-{role}", *[f"I-{role}"] * (last - first)]
    return tags


def _way_up(heads: Sequence[int | None], predicate: int, arguments: set[int]) -> set[int]:
    """Return the words from the predicate up to the argument that it lies in, if it does."""
    way: set[int] = set()
    place: int | None = predicate
    while place is not None and place not in way:
        if place in arguments:
            return way
        way.add(place)
        place = heads[place]
    return {predicate}


def _owner(
    heads: Sequence[int | None], start: int, arguments: set[int], way: set[int]
) -> int | None:
    """Return the nearest head of an argument at or above a word, not across the predicate."""
    seen: set[int] = set()
    place: int | None = start
    while place is not None and place not in seen:
        if place in arguments:
            return place
        if place in way:
            return None
        seen.add(place)
        place = heads[place]
    return None
