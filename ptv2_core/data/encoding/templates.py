"""Texts fill a template with a mask token, which a verbalizer head reads.

Letters: T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING

import numpy as np

from ptv2_core.data.encoding.rows import Row, chunks
from ptv2_core.data.examples import TextExample
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

MASK = "mask"
FIELDS = ("text", "text_pair", MASK)


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A filled template.

    Attributes:
        text: The whole.
        spans: Where the texts and the mask stand in it, in characters.
    """

    text: str
    spans: dict[str, tuple[int, int]]


def has_mask(task: TaskSpec) -> bool:
    """Tell whether a task's texts fill a template with a mask token."""
    return task.kind == "classification" and f"{{{MASK}}}" in (task.template or "")


def masked_rows(
    examples: Sequence[TextExample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: str,
    max_length: int,
) -> Iterator[list[Row]]:
    """Yield the row of each example; the longer text is cut, the template is kept whole.

    Args:
        examples: Texts.
        tokenizer: The backbone's.
        template: Such as `{text} It was {mask}.`
        max_length: Tokens of a row at most.

    Raises:
        ConfigError: The template is not one.
        DataError: The tokenizer has no mask token, an example lacks a text, or nothing but the
            template would fit.
    """
    parts = template_parts(template)
    if tokenizer.mask_token is None:
        raise DataError(
            f"task.template {template!r} has a {{mask}}, but the backbone's tokenizer has no mask "
            "token; take a backbone that was trained to fill masks, or a linear head"
        )
    for chunk in chunks(examples):
        filled = [_fill(example, parts, str(tokenizer.mask_token)) for example in chunk]
        encoded = tokenizer(
            [one.text for one in filled],
            return_token_type_ids=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for place, (example, one) in enumerate(zip(chunk, filled, strict=True)):
            yield [_cut(encoded, place, one, example.where, tokenizer, max_length)]


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return the fixed texts of a template, each with the field behind it.

    Raises:
        ConfigError: Other fields, none of a text, or not one mask.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError([("task.template", f"{error} in {template!r}")]) from error
    fields = [field for _, field, _, _ in parsed if field is not None]
    is_plain = all(not spec and not conversion for _, _, spec, conversion in parsed)
    once = len(set(fields)) == len(fields)
    if not (is_plain and once and set(fields) <= set(FIELDS) and {"text", MASK} <= set(fields)):
        expected = "{text} and {mask}, each once, and for pairs {text_pair}"
        raise ConfigError([("task.template", f"expected {expected}, got {template!r}")])
    return [(fixed, field) for fixed, field, _, _ in parsed]


def _fill(example: TextExample, parts: Sequence[tuple[str, str | None]], mask: str) -> Filled:
    values = {"text": example.text, "text_pair": example.text_pair, MASK: mask}
    text, spans = "", {}
    for fixed, field in parts:
        text += fixed
        if field is None:
            continue
        value = values[field]
        if value is None:
            raise DataError(
                f"{example.where}: the template has a {{text_pair}}, but the example has none; "
                "name its field, or take {text_pair} out of task.template"
            )
        spans[field] = (len(text), len(text) + len(value))
        text += value
    return Filled(text=text, spans=spans)


def _cut(
    encoded: "BatchEncoding",
    place: int,
    filled: Filled,
    where: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> Row:
    ids = np.array(encoded["input_ids"][place], dtype=np.int32)
    starts, ends = np.array(encoded["offset_mapping"][place]).reshape(-1, 2).T
    # tokens that lie wholly in a text; one that reaches into the template belongs to it
    is_special = np.array([text is None for text in encoded.sequence_ids(place)])
    texts = [
        np.flatnonzero((starts >= start) & (ends > start) & (ends <= end) & ~is_special).tolist()
        for field, (start, end) in filled.spans.items()
        if field != MASK
    ]
    fixed = len(ids) - sum(map(len, texts))
    over = len(ids) - max_length
    if over > 0 and fixed >= max_length:
        raise DataError(
            f"{where}: task.template alone has {fixed} tokens: expected fewer than "
            f"prepare.max_length ({max_length}); raise it or shorten the template"
        )
    kept = np.ones(len(ids), dtype=bool)
    for _ in range(over):
        # of two of one length the second
        kept[max(reversed(texts), key=len).pop()] = False
    mask_start, mask_end = filled.spans[MASK]
    is_mask = (ids == tokenizer.mask_token_id) & (ends > mask_start) & (starts < mask_end)
    return Row(
        input_ids=ids[kept],
        token_type_ids=np.array(encoded["token_type_ids"][place], dtype=np.int32)[kept],
        is_cut=over > 0,
        read_at=int(np.flatnonzero(is_mask[kept])[0]),
    )
