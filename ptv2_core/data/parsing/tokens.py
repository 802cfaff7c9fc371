"""Records of words with a tag each: tagging and semantic role labelling."""

from collections.abc import Sequence

from ptv2_core.data.examples import OUTSIDE, Record, TokensExample
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import values
from ptv2_core.errors import DataError

# the predicate itself and the rest of a divided one, which CoNLL's scorer leaves out of its total
PREDICATE_TAGS = ("V", "C-V")


def tagged(record: Record, fields: Fields) -> tuple[TokensExample, int]:
    """Return words with tags, and how many tags were mended."""
    tokens, tags, repaired = _words(record, fields)
    return TokensExample(tokens=tokens, tags=tags, where=record.where), repaired


def labelled_roles(record: Record, fields: Fields) -> tuple[TokensExample, int]:
    """Return words with the roles of one predicate, and how many tags were mended.

    The predicate's own tag becomes `O`.
    """
    tokens, tags, repaired = _words(record, fields, outside=PREDICATE_TAGS)
    path = values.named(fields.predicate)
    place = values.whole_number(record, path)
    if not 0 <= place < len(tokens):
        raise DataError(
            f"{record.where}: field {path!r} must be the place of the predicate among "
            f"{len(tokens)} tokens, 0 to {len(tokens) - 1}, got {place}"
        )
    example = TokensExample(tokens=tokens, tags=tags, predicate=place, where=record.where)
    return example, repaired


def _words(
    record: Record, fields: Fields, *, outside: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...] | None, int]:
    tokens = values.strings(record, values.named(fields.tokens))
    if fields.tags is None:
        return tokens, None, 0
    tags = values.strings(record, fields.tags)
    if len(tags) != len(tokens):
        raise DataError(
            f"{record.where}: {len(tokens)} tokens but {len(tags)} tags; each token needs one tag"
        )
    left_out = {*outside, *(f"{prefix}-{name}" for prefix in "BI" for name in outside)}
    kept = [OUTSIDE if tag in left_out else tag for tag in tags]
    mended, repaired = repair_tags(kept, where=record.where)
    return tokens, mended, repaired


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
