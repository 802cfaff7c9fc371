"""Raw inputs become typed examples without labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptv2_core.data.examples import (
    Example,
    OptionsExample,
    Record,
    TextExample,
    TokensExample,
)
from ptv2_core.data.fields import KIND_FIELDS, Fields, fields_of
from ptv2_core.data.parsing import parse_records
from ptv2_core.data.tasks import TaskKind, TaskSpec
from ptv2_core.errors import DataError

# keys of a prepared row that make an input; the others are labels, or name the row
INPUT_KEYS = (
    "text", "text_pair", "tokens", "predicate", "options", "names", "question", "context",
)  # fmt: skip
# names of an input's fields where they are not those of `fields_of`
NAMES: Mapping[TaskKind, Mapping[str, Any]] = {
    "multiple_choice": {"text": "text", "choices": ("choices",)},
}
# fields that tell a structured input from texts that were made of one before
STRUCTURED: Mapping[TaskKind, str] = {
    "word_in_context": "word",
    "coreference": "span1_text",
    "multirc": "answer",
    "multiple_choice": "choices",
    "record": "query",
}
# kinds of which an input can be a text and nothing else
TEXT_KINDS: tuple[TaskKind, ...] = ("classification", "regression", "tagging")
# fields of inputs that are no text
LIST_FIELDS = frozenset({"tokens", "choices", "entities", "options", "names"})
NUMBER_FIELDS = frozenset(
    {"predicate", "start1", "end1", "start2", "end2", "span1_index", "span2_index"}
)


@dataclass(frozen=True, kw_only=True)
class InputFields:
    """The fields of a task's inputs.

    Attributes:
        needed: Without which an input cannot be answered.
        optional: Which it may have as well.
        prepared: Which stand for all of them in the row of a prepared split.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    prepared: tuple[str, ...] = ()


def input_fields(task: TaskSpec) -> InputFields:
    """Return what an input of a task consists of, as `examples_of_inputs` takes it."""
    if task.kind == "tagging":
        return InputFields(needed=("tokens",))
    if task.kind in ("classification", "regression"):
        return InputFields(needed=("text", *(("text_pair",) if _has_pair(task) else ())))
    fields, known = _wanted(task.kind), KIND_FIELDS[task.kind]
    prepared: tuple[str, ...] = ()
    if task.kind in STRUCTURED:
        prepared = ("text", "options", "names") if task.form == "options" else ("text", "text_pair")
    return InputFields(
        needed=_names(fields, known.needed),
        optional=_names(fields, known.optional),
        prepared=prepared,
    )


def _names(fields: Fields, keys: Iterable[str]) -> tuple[str, ...]:
    found: list[str] = []
    for key in keys:
        value = getattr(fields, key)
        if value is not None:
            found += value if isinstance(value, tuple) else [value]
    return tuple(found)


def _wanted(kind: TaskKind) -> Fields:
    """Return the fields of an input, without what only labelled records have."""
    return replace(
        fields_of(kind, NAMES.get(kind, {})),
        label=None,
        tags=None,
        answers=None,
        is_impossible=None,
        id=None,
    )


def _has_pair(task: TaskSpec) -> bool:
    return "text_pair" in task.fields


def examples_of_inputs(inputs: Sequence[Mapping[str, Any]], task: TaskSpec) -> list[Example]:
    """Return an example an input.

    Args:
        inputs: For classification and regression `text`, and `text_pair` where the task has pairs;
            for tagging `tokens`, or a `text` that is split on white space; for SRL `tokens` and
            `predicate`; for a choice `text`, `choices` and maybe `question`; for questions
            `question` and `context`; for the other kinds the fields of SuperGLUE. The texts or
            options of a prepared row do as well.
        task: Its kind and template.

    Raises:
        DataError: An input lacks what its kind needs.
    """
    return [_example(f"input {place}", values, task) for place, values in enumerate(inputs, 1)]


def _example(where: str, values: Mapping[str, Any], task: TaskSpec) -> Example:
    _check_encodable(where, values)
    if task.kind == "tagging":
        return _tokens(where, values)
    if task.kind in ("classification", "regression"):
        has_pair = _has_pair(task)
        own = {key: value for key, value in values.items() if has_pair or key != "text_pair"}
        return _texts(where, own, task, needs_pair=has_pair)
    if task.kind in STRUCTURED and STRUCTURED[task.kind] not in values:
        if task.form == "options" and "options" in values:
            return _options(where, values)
        if task.form == "rows" and "text" in values:
            return _texts(where, values, task, needs_pair=False)
    return _parsed(where, values, task)


def _parsed(where: str, values: Mapping[str, Any], task: TaskSpec) -> Example:
    record = Record(where=where, values=values)
    fields = _wanted(task.kind)
    examples, _ = parse_records([record], kind=task.kind, fields=fields, template=task.template)
    if len(examples) != 1:
        raise DataError(
            f"{where}: expected one question, got a record of {len(examples)}; give each as an "
            "input of its own"
        )
    # rows of one question are answered one by one
    example = examples[0]
    return replace(example, group=None) if isinstance(example, TextExample) else example


def _tokens(where: str, values: Mapping[str, Any]) -> TokensExample:
    text, tokens = values.get("text"), values.get("tokens")
    words = tuple(tokens) if isinstance(tokens, list) else tuple(str(text or "").split())
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise DataError(f"{where}: expected `tokens` (texts) or a `text`, got {values!r:.80}")
    return TokensExample(tokens=words, tags=None, where=where)


def _texts(
    where: str, values: Mapping[str, Any], task: TaskSpec, *, needs_pair: bool
) -> TextExample:
    text, pair = values.get("text"), values.get("text_pair")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected a `text`, got {values!r:.80}")
    if needs_pair and (not isinstance(pair, str) or not pair.strip()):
        raise DataError(f"{where}: task {task.name} also needs a `text_pair`, got {pair!r:.80}")
    if pair is not None and not isinstance(pair, str):
        raise DataError(f"{where}: expected text as `text_pair`, got {pair!r:.80}")
    return TextExample(text=text, text_pair=pair, label=None, where=where)


def _options(where: str, values: Mapping[str, Any]) -> OptionsExample:
    text, options = values.get("text"), values["options"]
    names = values.get("names", options)
    if (
        not isinstance(text, str)
        or not all(_is_texts(some) for some in (options, names))
        or len(options) != len(names)
    ):
        raise DataError(
            f"{where}: expected a `text` and as many `options` as `names`, got {values!r:.80}"
        )
    return OptionsExample(
        text=text, options=tuple(options), names=tuple(names), correct=None, where=where
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _check_encodable(where: str, value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_encodable(where, item)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: character {error.start + 1} of {value!r:.60} is half a surrogate "
                "pair, which is not valid text; mend what wrote it"
            ) from error
