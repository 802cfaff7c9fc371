"""Raw records become typed examples; one small module a family of kinds. Loads no torch."""

from collections.abc import Iterable, Iterator

from ptv2_core.data.examples import Example, Record, TextExample
from ptv2_core.data.fields import TEMPLATES, Fields
from ptv2_core.data.parsing.marked import coreference, word_in_context
from ptv2_core.data.parsing.options import choice, cloze, queries_of, require_right_options
from ptv2_core.data.parsing.questions import question
from ptv2_core.data.parsing.texts import answered, answers_of, classified, measured
from ptv2_core.data.parsing.tokens import labelled_roles, repair_tags, tagged
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import DataError

__all__ = ["parse_records", "repair_tags", "require_right_options"]


def parse_records(
    records: Iterable[Record], *, kind: TaskKind, fields: Fields, template: str | None = None
) -> tuple[list[Example], int]:
    """Turn records into examples.

    A nested record of MultiRC or ReCoRD becomes an example an answer or a query. MultiRC's answers
    to one question stand together.

    Args:
        records: Raw records.
        kind: What the task predicts.
        fields: Which field is what; without a field for labels only answers are wanted.
        template: One of `TEMPLATES[kind]`; None takes the first.

    Returns:
        The examples, and the number of `I-` tags that began a span and were taken as `B-`, as the
        CoNLL evaluation does.

    Raises:
        DataError: All problems of all records, each with its place.
    """
    known = TEMPLATES.get(kind, ())
    chosen = template if template in known else (known[0] if known else "")
    problems: list[str] = []
    examples: list[Example] = []
    repaired = 0
    for number, record in enumerate(records, start=1):
        try:
            parts = list(_parts(record, fields, kind, number))
        except DataError as error:
            problems.append(str(error))
            continue
        for part in parts:
            try:
                example, count = _example(*part, kind, chosen)
            except DataError as error:
                problems.append(str(error))
                continue
            examples.append(example)
            repaired += count
    if problems:
        raise DataError.collected(problems)
    return _grouped(examples) if kind == "multirc" else examples, repaired


def _parts(
    record: Record, fields: Fields, kind: TaskKind, number: int
) -> Iterator[tuple[Record, Fields]]:
    if kind == "multirc":
        return answers_of(record, fields, number)
    if kind == "record":
        return queries_of(record, fields)
    return iter([(record, fields)])


def _example(record: Record, fields: Fields, kind: TaskKind, template: str) -> tuple[Example, int]:
    """Return the example of a record, and how many of its tags were mended."""
    match kind:
        case "classification":
            return classified(record, fields), 0
        case "regression":
            return measured(record, fields), 0
        case "multirc":
            return answered(record, fields), 0
        case "word_in_context":
            return word_in_context(record, fields, template), 0
        case "coreference":
            return coreference(record, fields, template), 0
        case "multiple_choice":
            return choice(record, fields, template), 0
        case "record":
            return cloze(record, fields), 0
        case "qa":
            return question(record, fields), 0
        case "srl":
            return labelled_roles(record, fields)
        case "tagging":
            return tagged(record, fields)


def _grouped(examples: list[Example]) -> list[Example]:
    """Return the examples with those of one group side by side, groups in their first order."""
    groups: dict[str | None, list[Example]] = {}
    for example in examples:
        assert isinstance(example, TextExample), "an answer is a text"
        groups.setdefault(example.group, []).append(example)
    return [example for group in groups.values() for example in group]
