"""Records with options to choose from: choices (COPA) and entities for a gap (ReCoRD)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptv2_core.data.examples import Example, OptionsExample, Record
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import values
from ptv2_core.errors import DataError

PLACEHOLDER = "@placeholder"
# COPA's two questions, by template; other questions are added as they are
ASKED: Mapping[str, Mapping[str, str]] = {
    "joined": {"cause": "because", "effect": "so"},
    "question": {
        "cause": "What was the cause of this?",
        "effect": "What happened as a result of this?",
    },
}


def choice(record: Record, fields: Fields, template: str) -> OptionsExample:
    """Return a text with choices to go on with.

    Templates: `joined` (`because` and `so` for COPA's questions, as in the paper's code),
    `question` (the questions in words).
    """
    text = values.text(record, values.named(fields.text))
    path = values.optional(record, fields, "question", kind="multiple_choice")
    if path is not None:
        question = values.text(record, path)
        text = f"{text} {ASKED[template].get(question, question)}"
    choices = _choices(record, fields)
    correct = None if fields.label is None else (_right(record, fields, choices),)
    return OptionsExample(
        text=text, options=choices, names=choices, correct=correct, where=record.where
    )


def _choices(record: Record, fields: Fields) -> tuple[str, ...]:
    paths = fields.choices or ()
    if len(paths) > 1:
        return tuple(values.text(record, path) for path in paths)
    path = values.named(paths[0])
    choices = values.checked_strings(record, path, values.field(record, path))
    if len(choices) < 2:
        raise DataError(f"{record.where}: field {path!r} must hold two choices or more, got one")
    return choices


def _right(record: Record, fields: Fields, choices: Sequence[str]) -> int:
    """Return the place of the right choice: its number, its text or the name of its field."""
    path = values.named(fields.label)
    value = values.field(record, path)
    found = {values.as_whole_number(value)} - {None}
    if isinstance(value, str):
        for names in (choices, fields.choices or ()):
            found |= {place for place, name in enumerate(names) if name == value}
    places = sorted(place for place in found if place is not None and 0 <= place < len(choices))
    if len(places) == 1:
        return places[0]
    if places:
        both = " and of ".join(str(place) for place in places)
        raise DataError(f"{record.where}: field {path!r} is {value!r}, which is said of {both}")
    raise DataError(
        f"{record.where}: field {path!r} must be the right choice, a number from 0 to "
        f"{len(choices) - 1}, got {values.shown(value)}"
    )


def cloze(record: Record, fields: Fields) -> OptionsExample:
    """Return a passage with a query, its gap filled by each distinct entity."""
    passage = values.text(record, values.named(fields.text))
    query = values.text(record, values.named(fields.query))
    if PLACEHOLDER not in query:
        raise DataError(
            f"{record.where}: expected {PLACEHOLDER} in field {fields.query!r}, got "
            f"{values.shown(query)}"
        )
    path = values.named(fields.entities)
    names = tuple(dict.fromkeys(values.checked_strings(record, path, values.field(record, path))))
    answers: tuple[str, ...] = ()
    if fields.answers is not None:
        found = values.field(record, fields.answers)
        answers = tuple(dict.fromkeys(values.checked_strings(record, fields.answers, found)))
    correct = tuple(place for place, name in enumerate(names) if name in answers)
    return OptionsExample(
        # the summary's points, as the paper's code has them
        text=passage.replace("@highlight\n", "- "),
        options=tuple(query.replace(PLACEHOLDER, name) for name in names),
        names=names,
        correct=None if fields.answers is None else correct,
        answers=answers,
        where=record.where,
    )


def queries_of(record: Record, fields: Fields) -> Iterator[tuple[Record, Fields]]:
    """Yield a record a query: a nested SuperGLUE passage is taken apart, all else is as it is.

    Raises:
        DataError: An entity's place is outside the passage.
    """
    passage, queries = record.values.get("passage"), record.values.get("qas")
    if not isinstance(passage, Mapping) or not isinstance(queries, list):
        yield record, fields
        return
    text = passage.get("text")
    entities = [_entity(record, text, span) for span in passage.get("entities") or ()]
    flat = Fields(
        text="passage",
        query="query",
        entities="entities",
        answers=None if fields.answers is None else "answers",
    )
    for place, query in enumerate(queries, start=1):
        found = query if isinstance(query, Mapping) else {}
        answers = [a.get("text") if isinstance(a, Mapping) else a for a in found.get("answers", ())]
        yield (
            Record(
                where=f"{record.where}, query {place}",
                values={
                    "passage": text,
                    "query": found.get("query"),
                    "entities": entities,
                    "answers": answers,
                },
            ),
            flat,
        )


def _entity(record: Record, text: Any, span: Any) -> str:
    """Return the text of an entity; SuperGLUE's ends are inclusive."""
    start, end = (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
    length = len(text) if isinstance(text, str) else 0
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end < length):
        raise DataError(
            f"{record.where}: expected an entity inside a passage of {length} characters, got "
            f"{start} to {end}"
        )
    return str(text[start : end + 1])


def require_right_options(examples: Sequence[Example]) -> None:
    """Check that there is a right option in each example that is learnt from.

    Raises:
        DataError: Naming each example without one.
    """
    problems = [
        f"{example.where}: none of the answers ({', '.join(example.answers)}) is an entity; "
        "nothing can be learnt from it: remove the record or mend its entities"
        for example in examples
        if isinstance(example, OptionsExample) and example.correct == ()
    ]
    if problems:
        raise DataError.collected(problems)
