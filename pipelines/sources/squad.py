"""SQuAD's JSON, versions 1.1 and 2.0: a record a question."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.sources import Record
from pipelines.sources.readers import (
    Outcome,
    is_encodable,
    refuse_constant,
    text_lines,
    unique_keys,
)


def read_squad(path: Path, shown: str) -> Outcome:
    """Read `{"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}`.

    A record has id, title, context, question, answers and is_impossible; its place is the file
    and the question's id.

    Args:
        path: The file.
        shown: The name of the file in places and problems.
    """
    problems: list[str] = []
    text = "\n".join(line for _, line in text_lines(path, shown, problems))
    if problems:
        return Outcome([], problems)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{shown}:{error.lineno}, column {error.colno}"
        return Outcome([], [f"{place}: not valid JSON: {error.msg}"])
    except (ValueError, RecursionError) as error:
        return Outcome([], [f"{shown}: not usable JSON: {error}"])
    if "\\u" in text and not is_encodable(value):
        return Outcome([], [f"{shown}: holds half of a surrogate pair, which is no character"])
    records: list[Record] = []
    seen: set[str] = set()
    for where, record in _questions(value, shown, problems):
        if record["id"] in seen:
            problems.append(f"{where}: the id is there twice; each question needs its own")
        seen.add(record["id"])
        records.append((where, record))
    return Outcome(records, problems)


def _questions(value: Any, shown: str, problems: list[str]) -> Iterator[Record]:
    """Yield the questions; what is not as SQuAD has it is a problem."""
    for article, place in _objects(value, "data", f"{shown}#", problems):
        for paragraph, inner in _objects(article, "paragraphs", f"{place}.", problems):
            context = paragraph.get("context")
            if not isinstance(context, str):
                problems.append(f"{inner}: expected context to be text, got {context!r:.80}")
                continue
            for question, at in _objects(paragraph, "qas", f"{inner}.", problems):
                name, answers = question.get("id"), question.get("answers")
                if not isinstance(name, str | int) or not str(name).strip():
                    problems.append(f"{at}: expected an id, got {name!r:.80}")
                elif not isinstance(answers, list):
                    problems.append(
                        f"{shown}#{name}: expected answers to be a list, got {answers!r:.80}"
                    )
                else:
                    yield (
                        f"{shown}#{name}",
                        {
                            "id": str(name),
                            "title": article.get("title", ""),
                            "context": context,
                            "question": question.get("question"),
                            "answers": answers,
                            # version 1.1 has no such key: all of its questions have answers
                            "is_impossible": question.get("is_impossible", not answers),
                        },
                    )


def _objects(
    value: Any, key: str, before: str, problems: list[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a list in an object, each with its place."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        problems.append(f"{before}{key}: expected a list, as SQuAD has, got {found!r:.80}")
        return
    for place, item in enumerate(found):
        if isinstance(item, dict):
            yield item, f"{before}{key}[{place}]"
        else:
            problems.append(f"{before}{key}[{place}]: expected an object, got {item!r:.80}")
