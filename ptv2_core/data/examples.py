"""Typed examples of all kinds; splits of them are carved deterministically. Loads no torch."""

import hashlib
import json
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ptv2_core.data.tasks import FORMS, NUM_OUTPUTS, TaskKind
from ptv2_core.errors import DataError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
OUTSIDE = "O"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A raw record and the place it came from, such as `data/mine/train.csv:18`."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """One or two texts with a label; the label is None where only an answer is wanted.

    Attributes:
        text: The first or only text.
        text_pair: The second.
        label: A class's name; for regression a number.
        group: Of rows that are scored together, such as the answers to one question.
        where: The record's place.
    """

    text: str
    text_pair: str | None
    label: str | float | None
    group: str | None = None
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class OptionsExample:
    """Options to choose from, each with the same text before it.

    Attributes:
        text: What all options share.
        options: The second text of each.
        names: What an answer is called, an option each: COPA's choice, ReCoRD's entity.
        correct: The places of right options; None where only an answer is wanted.
        answers: For ReCoRD the texts that count as right, else empty.
        where: The record's place.
    """

    text: str
    options: tuple[str, ...]
    names: tuple[str, ...]
    correct: tuple[int, ...] | None
    answers: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class TokensExample:
    """Tokens with a tag each; tags are None where only an answer is wanted.

    Attributes:
        tokens: The words.
        tags: IOB2.
        predicate: The place of the word whose arguments are wanted; None for plain tagging.
        where: The record's place.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    predicate: int | None = None
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer's text and the place of its first character in the context."""

    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class QuestionExample:
    """A question about a context.

    Attributes:
        question: The question.
        context: Holds the answer, if it has one.
        answers: All that count as right; empty: the context holds none. None where only an answer
            is wanted.
        id: Of the question in its data set.
        where: The record's place.
    """

    question: str
    context: str
    answers: tuple[Answer, ...] | None
    id: str = ""
    where: str = ""


Example = TextExample | OptionsExample | TokensExample | QuestionExample


def collect_labels(
    splits: Mapping[str, Sequence[Example]], *, kind: TaskKind, labels: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the closed label set: those given, else those of train, sorted.

    A set of tags has `O` first and both `B-` and `I-` of every type. Roles of predicates are those
    of all splits: rare ones (`R-ARGM-DIR`) often are in one alone, and count as missed where train
    lacks them. MultiRC's labels are `0` and `1`; kinds that answer with numbers, options or
    stretches of text have none.

    Args:
        splits: Examples by split; `train` is there.
        kind: What the task predicts.
        labels: A closed list that fixes the order.

    Raises:
        DataError: An example has a label outside the set, or train has fewer than two.
    """
    if FORMS[kind] in NUM_OUTPUTS:
        return ()
    if kind == "multirc":
        return ("0", "1")
    sources = splits.values() if kind == "srl" else [splits["train"]]
    found = sorted({label for source in sources for one in source for label in _labels_of(one)})
    if FORMS[kind] == "tokens":
        types = sorted({tag[2:] for tag in found if tag != OUTSIDE})
        found = [OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI")]
    known = tuple(labels) if labels is not None else tuple(found)
    if len(known) < 2:
        raise DataError(
            f"train has {len(known)} label(s) ({', '.join(known)}); a task needs two or more"
        )
    origin = "prepare.labels" if labels is not None else "train"
    problems = [
        f"{example.where}: unknown label {label!r} in {split}; {origin} has: {_listed(known)}"
        for split, examples in splits.items()
        for example in examples
        for label in sorted(set(_labels_of(example)) - set(known))
    ]
    if problems:
        raise DataError.collected(problems)
    return known


def _labels_of(example: Example) -> tuple[str, ...]:
    if isinstance(example, TokensExample):
        return example.tags or ()
    assert isinstance(example, TextExample), "options and answers in a text have no labels"
    return () if example.label is None else (str(example.label),)


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def carve_splits(
    splits: Mapping[str, list[Example]], *, dev_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[Example]]:
    """Return train, dev and test; a missing one is carved out of train.

    The choice depends on the seed and the number of rows alone; where examples share a passage, a
    context or a sentence, on which of them do, since one text is never in two carved splits.

    Args:
        splits: What the source has; `train` is there.
        dev_fraction: Share of train that becomes dev where the source has none.
        test_fraction: Likewise for test.
        seed: Of the choice.

    Raises:
        DataError: Train is too small to be split.
    """
    rows = splits["train"]
    order = _together(_shared_text(example) for example in rows)
    random.Random(f"splits {seed}").shuffle(order)
    result: dict[str, list[Example]] = {
        name: list(splits[name]) for name in SPLITS if name in splits
    }
    for name, fraction in (("dev", dev_fraction), ("test", test_fraction)):
        if name in splits:
            continue
        if fraction == 0:
            raise DataError(
                f"there is no {name} split and prepare.{name}_fraction is 0; add a {name} file, or "
                "set a share of train"
            )
        count = round(len(rows) * fraction)
        taken: list[int] = []
        while order and len(taken) < count:
            taken += order.pop(0)
        if not taken or not order:
            raise DataError(
                f"train has {len(rows)} rows, too few to carve {name} "
                f"({fraction:g}) out of it; add rows or a {name} file"
            )
        result[name] = [rows[place] for place in sorted(taken)]
    result["train"] = [rows[place] for places in sorted(order) for place in places]
    return {name: result[name] for name in SPLITS}


def _shared_text(example: Example) -> str | tuple[str, ...] | None:
    """Return the text that an example shares with others; None: it is alone."""
    if isinstance(example, QuestionExample):
        return example.context
    if isinstance(example, OptionsExample):
        return example.text if example.answers else None
    if isinstance(example, TokensExample):
        return None if example.predicate is None else example.tokens
    return None if example.group is None else example.text


def _together(keys: Iterable[Hashable | None]) -> list[list[int]]:
    """Return the places of equal keys in a list each, in order; None is equal to nothing."""
    found: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        # the place itself cannot be a key: keys are texts
        found.setdefault(place if key is None else key, []).append(place)
    return list(found.values())


def cut_rows(examples: Sequence[Example], most: int | None, *, seed: int) -> list[Example]:
    """Return at most `most` examples, chosen by the seed, in their first order.

    A group is kept whole or left out, but for a first one that is larger than `most`.
    """
    if most is None or len(examples) <= most:
        return list(examples)
    groups = _together(getattr(example, "group", None) for example in examples)
    draw = random.Random(f"rows {seed}")
    if len(groups) == len(examples):
        return [examples[place] for place in sorted(draw.sample(range(len(examples)), most))]
    draw.shuffle(groups)
    chosen = groups.pop(0)
    for group in groups:
        if len(chosen) + len(group) <= most:
            chosen = chosen + group
    return [examples[place] for place in sorted(chosen)]


def example_to_mapping(example: Example) -> dict[str, Any]:
    """Return the plain values that a prepared split's JSONL holds."""
    if isinstance(example, TokensExample):
        tags = None if example.tags is None else list(example.tags)
        place = {} if example.predicate is None else {"predicate": example.predicate}
        return {"tokens": list(example.tokens), **place, "tags": tags}
    if isinstance(example, OptionsExample):
        return {
            "text": example.text,
            "options": list(example.options),
            "names": list(example.names),
            "correct": None if example.correct is None else list(example.correct),
            "answers": list(example.answers),
        }
    if isinstance(example, QuestionExample):
        answers = None
        if example.answers is not None:
            answers = [{"text": answer.text, "start": answer.start} for answer in example.answers]
        return {
            "question": example.question,
            "context": example.context,
            "answers": answers,
            "id": example.id,
        }
    pair = {} if example.text_pair is None else {"text_pair": example.text_pair}
    group = {} if example.group is None else {"group": example.group}
    return {"text": example.text, **pair, "label": example.label, **group}


def digest_examples(examples: Iterable[Example]) -> str:
    """Return `sha256:...` over the content of examples, in order, their places left out."""
    digest = hashlib.sha256()
    for example in examples:
        line = json.dumps(example_to_mapping(example), ensure_ascii=False, sort_keys=True)
        digest.update(line.encode("utf-8") + b"\n")
    return f"sha256:{digest.hexdigest()}"
