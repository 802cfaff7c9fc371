"""Records of one or two texts: classification, regression, and answers that are right or wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

from ptv2_core.data.examples import Record, TextExample
from ptv2_core.data.fields import Fields, fields_of
from ptv2_core.data.parsing import values
from ptv2_core.errors import DataError

TRUTH = {"0": "0", "1": "1", "false": "0", "true": "1"}


def classified(record: Record, fields: Fields) -> TextExample:
    """Return one or two texts with a class."""
    return TextExample(
        text=values.text(record, values.named(fields.text)),
        text_pair=values.text(record, fields.text_pair) if fields.text_pair else None,
        label=values.label(record, fields.label) if fields.label else None,
        where=record.where,
    )


def measured(record: Record, fields: Fields) -> TextExample:
    """Return one or two texts with a number."""
    return TextExample(
        text=values.text(record, values.named(fields.text)),
        text_pair=values.text(record, fields.text_pair) if fields.text_pair else None,
        label=values.number(record, fields.label) if fields.label else None,
        where=record.where,
    )


def answered(record: Record, fields: Fields) -> TextExample:
    """Return a paragraph with a question and one answer, labelled `1` where it is right."""
    text = values.text(record, values.named(fields.text))
    question = values.text(record, values.named(fields.question))
    # MultiRC as published has three empty answers
    answer = values.text(record, values.named(fields.answer), may_be_empty=True)
    return TextExample(
        text=text,
        text_pair=f"{question} {answer}".rstrip(),
        label=_truth(record, fields.label) if fields.label else None,
        group=_group(record, fields, f"{text}\n{question}"),
        where=record.where,
    )


def _truth(record: Record, path: str) -> str:
    label = values.label(record, path)
    if label.lower() not in TRUTH:
        raise DataError(
            f"{record.where}: field {path!r} must be 0 (a wrong answer) or 1 (a right one), "
            f"got {label!r}"
        )
    return TRUTH[label.lower()]


def _group(record: Record, fields: Fields, text: str) -> str:
    if fields.group:
        return values.label(record, fields.group)
    place = record.values.get("idx")
    if isinstance(place, Mapping) and {"paragraph", "question"} <= set(place):
        return f"{place['paragraph']}-{place['question']}"
    return text


def answers_of(record: Record, fields: Fields, number: int) -> Iterator[tuple[Record, Fields]]:
    """Yield a record an answer: a nested SuperGLUE passage is taken apart, all else is as it is.

    Args:
        record: A passage with its questions and their answers, or one answer.
        fields: Of a record that is one answer.
        number: Of the record in its split, which tells apart the groups of two passages.
    """
    passage = record.values.get("passage")
    if not isinstance(passage, Mapping) or "questions" not in passage:
        yield record, fields
        return
    flat = fields_of("multirc", {"group": "group"})
    for place, question in enumerate(_mappings(record, passage, "questions"), start=1):
        where = f"{record.where}, question {place}"
        inner = Record(where=where, values=question)
        for count, answer in enumerate(_mappings(inner, question, "answers"), start=1):
            found: dict[str, Any] = {
                "paragraph": passage.get("text"),
                "question": question.get("question"),
                "answer": answer.get("text"),
                "group": f"{number}-{place}",
            }
            if fields.label is not None:
                found["label"] = answer.get("label")
            kept = flat if fields.label is not None else Fields(**{**vars(flat), "label": None})
            yield Record(where=f"{where}, answer {count}", values=found), kept


def _mappings(record: Record, values_: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = values_.get(name)
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise DataError(
            f"{record.where}: field {name!r} must be a list of objects, got {values.shown(found)}"
        )
    return found
