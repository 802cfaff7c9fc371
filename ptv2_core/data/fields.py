"""Which field of a record is what: the names of each kind of task, and their defaults.

Loads neither torch nor numpy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ptv2_core.data.tasks import TaskKind

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which field of a record is what; dots reach into nested objects.

    Attributes:
        text: The first or only text; a premise, a passage, a paragraph.
        text_pair: The second text.
        label: The class, the number, or the right choice; None where only an answer is wanted.
        tokens: The words, a list or text with blanks.
        tags: A tag for each word.
        predicate: The place of the predicate among the words, from 0.
        question: What is asked; in a choice: `cause`, `effect`, or words to add to the text.
        choices: A field for each choice, or one field with a list of them.
        answer: An answer that is right or wrong.
        group: What the answers to one question share; None takes the record's `idx`, or else
            paragraph and question.
        word: The word whose meaning is asked for.
        start: Where it begins in the first text, in characters.
        end: Where it ends.
        start_pair: Where it begins in the second text.
        end_pair: Where it ends there.
        span1_text: The words that a pronoun may stand for.
        span1_index: Their place among the words of the text, which blanks divide.
        span2_text: The pronoun.
        span2_index: Its place.
        query: A sentence with `@placeholder` in it.
        entities: What may take its place.
        answers: All right answers; for `qa` with their places.
        context: The text that holds the answer.
        id: The question's name.
        is_impossible: Whether the context holds no answer.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None
    tags: str | None = None
    predicate: str | None = None
    question: str | None = None
    choices: tuple[str, ...] | None = None
    answer: str | None = None
    group: str | None = None
    word: str | None = None
    start: str | None = None
    end: str | None = None
    start_pair: str | None = None
    end_pair: str | None = None
    span1_text: str | None = None
    span1_index: str | None = None
    span2_text: str | None = None
    span2_index: str | None = None
    query: str | None = None
    entities: str | None = None
    answers: str | None = None
    context: str | None = None
    id: str | None = None
    is_impossible: str | None = None

    def named(self) -> dict[str, str]:
        """Return the fields that are set; several choices are joined by `, `."""
        return {
            name: ", ".join(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class KindFields:
    """The fields of one kind of task.

    Attributes:
        needed: Without which a record cannot be read, each with the name it has by default; None:
            there is no custom, so that it must be given.
        optional: Those that a record may lack, likewise.
    """

    needed: Mapping[str, Any]
    optional: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


# The defaults are the names of SuperGLUE and SQuAD.
KIND_FIELDS: Mapping[TaskKind, KindFields] = {
    "classification": KindFields(
        needed={"text": None, "label": None}, optional={"text_pair": None}
    ),
    "regression": KindFields(needed={"text": None, "label": None}, optional={"text_pair": None}),
    "multiple_choice": KindFields(
        needed={"text": "premise", "choices": ("choice1", "choice2"), "label": "label"},
        optional={"question": "question"},
    ),
    "word_in_context": KindFields(
        needed={"text": "sentence1", "text_pair": "sentence2", "word": "word", "label": "label"},
        optional={"start": "start1", "end": "end1", "start_pair": "start2", "end_pair": "end2"},
    ),
    "coreference": KindFields(
        needed={
            "text": "text",
            "span1_text": "span1_text",
            "span1_index": "span1_index",
            "span2_text": "span2_text",
            "span2_index": "span2_index",
            "label": "label",
        },
    ),
    "multirc": KindFields(
        needed={"text": "paragraph", "question": "question", "answer": "answer", "label": "label"},
        optional={"group": None},
    ),
    "record": KindFields(
        needed={"text": "passage", "query": "query", "entities": "entities", "answers": "answers"},
    ),
    "tagging": KindFields(needed={"tokens": None, "tags": None}),
    "srl": KindFields(needed={"tokens": "tokens", "predicate": "predicate", "tags": "tags"}),
    "qa": KindFields(
        needed={"question": "question", "context": "context", "answers": "answers"},
        optional={"id": "id", "is_impossible": "is_impossible"},
    ),
}

TEMPLATES: Mapping[TaskKind, tuple[str, ...]] = {
    "multiple_choice": ("joined", "question"),
    "word_in_context": ("prefix", "quoted", "question"),
    "coreference": ("starred", "prefix", "replaced", "question"),
}
"""The ways in which a structured record becomes text; the first is the default."""


def fields_of(kind: TaskKind, given: Mapping[str, Any] = NOTHING) -> Fields:
    """Return the fields of a kind of task: those given, the customary ones for the rest.

    Args:
        kind: The kind of task.
        given: Names of fields; None counts as not given.
    """
    known = KIND_FIELDS[kind]
    values = {**known.needed, **known.optional}
    values |= {name: value for name, value in given.items() if value is not None}
    return Fields(**values)
