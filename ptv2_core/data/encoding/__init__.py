"""Examples become token ids in flat arrays that can be memory-mapped: values and offsets."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ptv2_core.data.encoding.rows import Row, option_rows, text_rows, word_rows
from ptv2_core.data.encoding.split import EncodedSplit, EncodingReport, IntArray, LongArray
from ptv2_core.data.encoding.templates import has_mask, masked_rows
from ptv2_core.data.encoding.windows import window_rows
from ptv2_core.data.examples import (
    Example,
    OptionsExample,
    QuestionExample,
    TextExample,
    TokensExample,
)
from ptv2_core.data.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "EncodedSplit",
    "EncodingReport",
    "IntArray",
    "LongArray",
    "encode_examples",
    "encode_inputs",
    "has_second_text",
]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: TaskSpec,
    max_length: int,
    stride: int = 0,
) -> tuple[EncodedSplit, EncodingReport]:
    """Encode labelled examples.

    Args:
        examples: All of the task's kind.
        tokenizer: The backbone's, fast.
        task: Its kind, labels and template.
        max_length: Tokens of a row at most, special tokens included; longer rows are cut and
            counted.
        stride: Tokens that two windows of a long context share.

    Returns:
        The flat arrays, and a report.

    Raises:
        ConfigError: The task's template is not one.
        DataError: An example does not fit the template or the length.
    """
    by_example = list(_rows(examples, tokenizer, task, max_length, stride))
    rows = [row for found in by_example for row in found]
    split = _split(examples, by_example, task, labels=_labels(examples, rows, task))
    report = EncodingReport(
        rows=len(rows),
        tokens=int(split.lengths.sum()),
        longest=int(split.lengths.max(initial=0)),
        truncated=sum(row.is_cut for row in rows),
        groups=split.num_groups,
        windows=len(rows) - len(examples) if task.form == "spans" else 0,
    )
    return split, report


def encode_inputs(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: TaskSpec,
    max_length: int,
    stride: int = 0,
) -> tuple[EncodedSplit, list[bool]]:
    """Encode examples without labels, to answer them; arguments and errors as above.

    Returns:
        The flat arrays, and for each example whether it was cut to the maximal length.
    """
    by_example = list(_rows(examples, tokenizer, task, max_length, stride))
    split = _split(examples, by_example, task, labels=np.zeros(0, dtype=np.int32))
    return split, [any(row.is_cut for row in rows) for rows in by_example]


def has_second_text(example: Example, task: TaskSpec) -> bool:
    """Tell whether the rows of an example have a second text, behind a separator."""
    if isinstance(example, TextExample):
        return example.text_pair is not None and not has_mask(task)
    if isinstance(example, TokensExample):
        return example.predicate is not None
    return True


def _split(
    examples: Sequence[Example],
    by_example: Sequence[Sequence[Row]],
    task: TaskSpec,
    *,
    labels: npt.NDArray[Any],
) -> EncodedSplit:
    """Join the rows of all examples."""
    rows = [row for found in by_example for row in found]
    counts = [len(found) for found in by_example]
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    no_words = np.full(int(lengths.sum()), -1, dtype=np.int32)
    words = _joined([row.word_index for row in rows if row.word_index is not None])
    notes = [note for note in map(_note, examples) if note]
    return EncodedSplit(
        input_ids=_joined([row.input_ids for row in rows]),
        token_type_ids=_joined([row.token_type_ids for row in rows]),
        word_index=words if len(words) else no_words,
        offsets=_offsets(lengths),
        labels=labels,
        word_offsets=_offsets([row.num_words for row in rows]),
        groups=_groups(examples, counts),
        units=_offsets(counts) if task.form == "options" else np.zeros(0, dtype=np.int64),
        chars=_joined([row.chars for row in rows if row.chars is not None]).reshape(-1, 2),
        notes=np.frombuffer(b"".join(notes), dtype=np.uint8),
        note_offsets=_offsets([len(note) for note in notes]) if notes else np.zeros(0, np.int64),
        read_at=np.array([row.read_at for row in rows if row.read_at >= 0], dtype=np.int64),
    )


def _rows(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    task: TaskSpec,
    max_length: int,
    stride: int,
) -> Iterator[list[Row]]:
    """Yield the rows of each example."""
    if task.form == "spans":
        questions = cast("Sequence[QuestionExample]", examples)
        return window_rows(questions, tokenizer, max_length=max_length, stride=stride)
    if task.form == "options":
        options = cast("Sequence[OptionsExample]", examples)
        return option_rows(options, tokenizer, max_length=max_length)
    if task.form == "tokens":
        tokens = cast("Sequence[TokensExample]", examples)
        return word_rows(tokens, tokenizer, max_length=max_length)
    texts = cast("Sequence[TextExample]", examples)
    if has_mask(task):
        assert task.template is not None, "it has a mask"
        return masked_rows(texts, tokenizer, template=task.template, max_length=max_length)
    # an answer that is cut off could not be told from another
    keeps_second = task.kind == "multirc"
    return text_rows(texts, tokenizer, max_length=max_length, keeps_second=keeps_second)


def _labels(examples: Sequence[Example], rows: Sequence[Row], task: TaskSpec) -> npt.NDArray[Any]:
    if task.form == "spans":
        return np.array([row.answer for row in rows], dtype=np.int32).reshape(-1, 2)
    labels = [label for example in examples for label in _labels_of(example)]
    if task.form == "values":
        return np.array(labels, dtype=np.float32)
    if task.form != "options":
        index = {label: place for place, label in enumerate(task.labels)}
        labels = [index[label] for label in labels]
    return np.array(labels, dtype=np.int32)


def _labels_of(example: Example) -> Sequence[Any]:
    if isinstance(example, TokensExample):
        assert example.tags is not None, "an example to learn from has tags"
        return example.tags
    if isinstance(example, OptionsExample):
        assert example.correct is not None, "an example to learn from has a right option"
        return [place in example.correct for place in range(len(example.options))]
    assert isinstance(example, TextExample), "answers to questions are labels of rows"
    assert example.label is not None, "an example to learn from has a label"
    return [example.label]


def _groups(examples: Sequence[Example], counts: Sequence[int]) -> LongArray:
    """Return the group of each row; empty where each row is its own."""
    names = [example.group for example in examples if isinstance(example, TextExample)]
    if any(names):
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return np.array([numbers[name] for name in names], dtype=np.int64)
    if isinstance(examples[0] if examples else None, OptionsExample | QuestionExample):
        return np.repeat(np.arange(len(examples), dtype=np.int64), counts)
    return np.zeros(0, dtype=np.int64)


def _note(example: Example) -> bytes:
    """Return what scoring needs of the texts; empty for nothing."""
    note: dict[str, Any] = {}
    if isinstance(example, OptionsExample):
        note = {"names": example.names, "answers": example.answers}
    elif isinstance(example, QuestionExample):
        answers = [answer.text for answer in example.answers or ()]
        note = {"id": example.id, "context": example.context, "answers": answers}
    return json.dumps(note, ensure_ascii=False).encode("utf-8") if note else b""


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _offsets(lengths: Sequence[int] | LongArray) -> LongArray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
