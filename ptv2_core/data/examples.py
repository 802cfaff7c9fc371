"""Validated records become typed examples; splits are carved deterministically. Loads no torch."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import DataError

SPLITS = ("train", "dev", "test")
OUTSIDE = "O"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A raw record and the place it came from, such as `data/mine/train.csv:18`."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """One or two texts with a label; the label is None where only an answer is wanted."""

    text: str
    text_pair: str | None
    label: str | None
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class TokensExample:
    """Tokens with a tag each; tags are None where only an answer is wanted."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    where: str = ""


Example = TextExample | TokensExample


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which field of a record is what; dots reach into nested objects."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None
    tags: str | None = None

    def named(self) -> dict[str, str]:
        """Return the fields that are set."""
        return {name: field for name, field in vars(self).items() if field is not None}


def parse_records(
    records: Iterable[Record], *, kind: TaskKind, fields: Fields
) -> tuple[list[Example], int]:
    """Turn records into examples.

    Args:
        records: Raw records.
        kind: What the task predicts.
        fields: Which field is what.

    Returns:
        The examples, and the number of `I-` tags that began a span and were taken as `B-`, as the
        CoNLL evaluation does.

    Raises:
        DataError: All problems of all records, each with its place.
    """
    problems: list[str] = []
    examples: list[Example] = []
    repaired = 0
    for record in records:
        try:
            if kind == "classification":
                examples.append(_text_example(record, fields))
            else:
                example, count = _tokens_example(record, fields)
                examples.append(example)
                repaired += count
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError.collected(problems)
    return examples, repaired


def _field(record: Record, path: str) -> Any:
    value: Any = record.values
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(sorted(map(str, record.values)))
            raise DataError(f"{record.where}: no field {path!r}; the record has: {known}")
        value = value[part]
    return value


def _text(record: Record, path: str) -> str:
    value = _field(record, path)
    if not isinstance(value, str):
        raise DataError(f"{record.where}: field {path!r} must be text, got {value!r:.80}")
    if not value.strip():
        raise DataError(f"{record.where}: field {path!r} is empty; remove the record or fill it in")
    return value


def _label(record: Record, path: str) -> str:
    value = _field(record, path)
    if isinstance(value, bool | int | str) and str(value).strip():
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise DataError(
        f"{record.where}: field {path!r} must be a label's name or number, got {value!r:.80}"
    )


def _text_example(record: Record, fields: Fields) -> TextExample:
    assert fields.text is not None, "the settings name the text field"
    return TextExample(
        text=_text(record, fields.text),
        text_pair=_text(record, fields.text_pair) if fields.text_pair else None,
        label=_label(record, fields.label) if fields.label else None,
        where=record.where,
    )


def _tokens_example(record: Record, fields: Fields) -> tuple[TokensExample, int]:
    assert fields.tokens is not None, "the settings name the tokens field"
    tokens = _strings(record, fields.tokens)
    if fields.tags is None:
        return TokensExample(tokens=tokens, tags=None, where=record.where), 0
    tags = _strings(record, fields.tags)
    if len(tags) != len(tokens):
        raise DataError(
            f"{record.where}: {len(tokens)} tokens but {len(tags)} tags; each token needs one tag"
        )
    mended, repaired = repair_tags(tags, where=record.where)
    return TokensExample(tokens=tokens, tags=mended, where=record.where), repaired


def _strings(record: Record, path: str) -> tuple[str, ...]:
    value = _field(record, path)
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise DataError(
            f"{record.where}: field {path!r} must be a list of texts, got {value!r:.80}"
        )
    if not value:
        raise DataError(f"{record.where}: field {path!r} is empty; remove the record or fill it in")
    blank = next((place for place, item in enumerate(value) if not item.strip()), None)
    if blank is not None:
        raise DataError(f"{record.where}: item {blank + 1} of field {path!r} is empty")
    return tuple(value)


def repair_tags(tags: Sequence[str], *, where: str = "") -> tuple[tuple[str, ...], int]:
    """Return tags in strict IOB2, and how many `I-` began a span and became `B-`.

    Args:
        tags: `O`, `B-type` or `I-type`.
        where: The record's place, for the error.

    Raises:
        DataError: A tag of another form.
    """
    mended: list[str] = []
    repaired = 0
    for place, tag in enumerate(tags):
        prefix, _, name = tag.partition("-")
        if tag != OUTSIDE and (prefix not in ("B", "I") or not name):
            raise DataError(f"{where}: tag {place + 1} must be O, B-type or I-type, got {tag!r}")
        if prefix == "I" and (not mended or mended[-1][2:] != name):
            tag = f"B-{name}"
            repaired += 1
        mended.append(tag)
    return tuple(mended), repaired


def collect_labels(
    splits: Mapping[str, Sequence[Example]], *, kind: TaskKind, labels: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the closed label set: those given, else those of train, sorted.

    A tagging set has `O` first and both `B-` and `I-` of every type.

    Args:
        splits: Examples by split; `train` is there.
        kind: What the task predicts.
        labels: A closed list that fixes the order.

    Raises:
        DataError: An example has a label outside the set, or train has fewer than two.
    """
    found = sorted({label for example in splits["train"] for label in _labels_of(example)})
    if kind == "tagging":
        types = sorted({tag[2:] for tag in found if tag != OUTSIDE})
        found = [OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI")]
    known = tuple(labels) if labels is not None else tuple(found)
    if len(known) < 2:
        raise DataError(
            f"train has {len(known)} label(s) ({', '.join(known)}); a task needs two or more"
        )
    source = "prepare.labels" if labels is not None else "train"
    problems = [
        f"{example.where}: unknown label {label!r} in {split}; {source} has: {_listed(known)}"
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
    return () if example.label is None else (example.label,)


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def carve_splits(
    splits: Mapping[str, list[Example]], *, dev_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[Example]]:
    """Return train, dev and test; a missing one is carved out of train.

    The choice depends on the seed and the number of rows alone.

    Args:
        splits: What the source has; `train` is there.
        dev_fraction: Share of train that becomes dev where the source has none.
        test_fraction: Likewise for test.
        seed: Of the choice.

    Raises:
        DataError: Train is too small to be split.
    """
    order = list(range(len(splits["train"])))
    random.Random(f"splits {seed}").shuffle(order)
    result = {name: list(splits[name]) for name in SPLITS if name in splits}
    for name, fraction in (("dev", dev_fraction), ("test", test_fraction)):
        if name in splits:
            continue
        if fraction == 0:
            raise DataError(
                f"there is no {name} split and prepare.{name}_fraction is 0; add a {name} file, or "
                "set a share of train"
            )
        count = round(len(splits["train"]) * fraction)
        if count < 1 or count >= len(order):
            raise DataError(
                f"train has {len(splits['train'])} rows, too few to carve {name} "
                f"({fraction:g}) out of it; add rows or a {name} file"
            )
        taken, order = order[:count], order[count:]
        result[name] = [splits["train"][place] for place in sorted(taken)]
    result["train"] = [splits["train"][place] for place in sorted(order)]
    return {name: result[name] for name in SPLITS}


def cut_rows(examples: Sequence[Example], most: int | None, *, seed: int) -> list[Example]:
    """Return at most `most` examples, chosen by the seed, in their first order."""
    if most is None or len(examples) <= most:
        return list(examples)
    chosen = random.Random(f"rows {seed}").sample(range(len(examples)), most)
    return [examples[place] for place in sorted(chosen)]


def example_to_mapping(example: Example) -> dict[str, Any]:
    """Return the plain values that a prepared split's JSONL holds."""
    if isinstance(example, TokensExample):
        tags = None if example.tags is None else list(example.tags)
        return {"tokens": list(example.tokens), "tags": tags}
    pair = {} if example.text_pair is None else {"text_pair": example.text_pair}
    return {"text": example.text, **pair, "label": example.label}


def digest_examples(examples: Iterable[Example]) -> str:
    """Return `sha256:...` over the content of examples, in order, their places left out."""
    digest = hashlib.sha256()
    for example in examples:
        line = json.dumps(example_to_mapping(example), ensure_ascii=False, sort_keys=True)
        digest.update(line.encode("utf-8") + b"\n")
    return f"sha256:{digest.hexdigest()}"
