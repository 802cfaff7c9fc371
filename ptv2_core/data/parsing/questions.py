"""Records of a question about a context that holds the answer, as SQuAD has them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ptv2_core.data.examples import Answer, QuestionExample, Record
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import values
from ptv2_core.errors import DataError


def question(record: Record, fields: Fields) -> QuestionExample:
    """Return a question, its context and the answers that count; none: it has no answer."""
    context = values.text(record, values.named(fields.context))
    answers = None if fields.answers is None else _answers(record, fields.answers, context)
    path = values.optional(record, fields, "is_impossible", kind="qa")
    if path is not None and answers is not None:
        _check_impossible(record, path, answers)
    id_path = values.optional(record, fields, "id", kind="qa")
    return QuestionExample(
        question=values.text(record, values.named(fields.question)).strip(),
        context=context,
        answers=answers,
        id="" if id_path is None else values.label(record, id_path),
        where=record.where,
    )


def _check_impossible(record: Record, path: str, answers: Sequence[Answer]) -> None:
    is_impossible = values.field(record, path)
    if not isinstance(is_impossible, bool):
        raise DataError(
            f"{record.where}: field {path!r} must be true or false, got "
            f"{values.shown(is_impossible)}"
        )
    if is_impossible == bool(answers):
        got = f"{len(answers)} answers" if answers else "no answer"
        raise DataError(
            f"{record.where}: field {path!r} is {is_impossible}, but the question has {got}"
        )


def _answers(record: Record, path: str, context: str) -> tuple[Answer, ...]:
    """Return the answers in either of SQuAD's forms, each at its place in the context."""
    value = values.field(record, path)
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if not (_is_list(texts) and _is_list(starts) and len(texts) == len(starts)):
            raise DataError(
                f"{record.where}: field {path!r} must hold the lists text and answer_start of one "
                f"length, got {values.shown(value)}"
            )
        pairs = list(zip(texts, starts, strict=True))
    elif _is_list(value) and all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("text"), item.get("answer_start")) for item in value]
    else:
        raise DataError(
            f"{record.where}: field {path!r} must be a list of objects with text and "
            f"answer_start, got {values.shown(value)}"
        )
    return tuple(_answer(record, path, context, text, start) for text, start in pairs)


def _answer(record: Record, path: str, context: str, text: Any, start: Any) -> Answer:
    if not isinstance(text, str) or not text.strip() or values.as_whole_number(start) is None:
        raise DataError(
            f"{record.where}: an answer of field {path!r} must have text and a whole number as "
            f"answer_start, got {values.shown(text)} at {values.shown(start)}"
        )
    place = int(start)
    found = context[max(place, 0) : max(place, 0) + len(text)]
    if place < 0 or found != text:
        elsewhere = context.find(text)
        hint = f"; it is at {elsewhere}" if elsewhere >= 0 else "; it is nowhere in it"
        raise DataError(
            f"{record.where}: expected the answer {values.shown(text)} at character {place} of a "
            f"context of {len(context)}, got {values.shown(found)}{hint}"
        )
    stripped = text.lstrip()
    return Answer(text=stripped.rstrip(), start=place + len(text) - len(stripped))


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)
