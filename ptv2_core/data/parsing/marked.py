"""Records with marked words, which a template turns into texts: WiC and WSC."""

import re
import string
from collections.abc import Mapping

from ptv2_core.data.examples import Record, TextExample
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import values
from ptv2_core.errors import DataError


def word_in_context(record: Record, fields: Fields, template: str) -> TextExample:
    """Return two sentences that share a word, with the word made plain.

    Templates: `prefix` (the word before both; the paper's code for BERT), `quoted` (the word in
    quotes in both), `question` (one text that ends in a question; the paper's code for RoBERTa).
    """
    first = values.text(record, values.named(fields.text))
    second = values.text(record, values.named(fields.text_pair))
    word = values.text(record, values.named(fields.word))
    spans = (
        _span(record, fields, first, "start", "end"),
        _span(record, fields, second, "start_pair", "end_pair"),
    )
    pair: tuple[str, str | None] = (f"{word}: {first}", f"{word}: {second}")
    if template == "quoted":
        pair = (_quoted(record, first, spans[0]), _quoted(record, second, spans[1]))
    elif template == "question":
        asked = f"Does {word} have the same meaning in both sentences?"
        pair = (f"{first} {second} {asked}", None)
    return TextExample(
        text=pair[0],
        text_pair=pair[1],
        label=values.label(record, fields.label) if fields.label else None,
        where=record.where,
    )


def _span(
    record: Record, fields: Fields, text: str, start_name: str, end_name: str
) -> tuple[int, int] | None:
    """Return the characters of a marked word; None where the record does not mark it."""
    names = (start_name, end_name)
    paths = [values.optional(record, fields, name, kind="word_in_context") for name in names]
    if paths == [None, None]:
        return None
    named = [path or getattr(fields, name) for path, name in zip(paths, names, strict=True)]
    start, end = (values.whole_number(record, path) for path in named)
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{record.where}: expected {named[0]!r} and {named[1]!r} inside a text of "
            f"{len(text)} characters, got {start} to {end}"
        )
    return start, end


def _quoted(record: Record, text: str, span: tuple[int, int] | None) -> str:
    if span is None:
        raise DataError(
            f"{record.where}: template quoted needs the places of the word; name start, end, "
            "start_pair and end_pair, or take template prefix"
        )
    start, end = span
    return f'{text[:start]}"{text[start:end]}"{text[end:]}'


def coreference(record: Record, fields: Fields, template: str) -> TextExample:
    """Return a text whose pronoun may stand for some words of it.

    Templates: `starred` (the pronoun between stars, then the words; the paper's code), `prefix`
    (the pronoun before the text, then the words; likewise), `replaced` (the text, then the text
    with the words in the pronoun's place), `question` (the text, then a question).
    """
    target = record.values.get("target")
    if isinstance(target, Mapping):
        # SuperGLUE's own files keep the spans in an object
        record = Record(where=record.where, values={**target, **record.values})
    text = values.text(record, values.named(fields.text))
    words = text.split()
    _, noun = _marked(record, words, fields.span1_text, fields.span1_index)
    place, pronoun = _marked(record, words, fields.span2_text, fields.span2_index)
    end = place + len(pronoun.split())
    if template == "starred":
        marked = [*words[:place], f"*{' '.join(words[place:end])}*", *words[end:]]
        pair = (" ".join(marked), noun)
    elif template == "prefix":
        pair = (f"{pronoun}: {text}", noun)
    elif template == "replaced":
        # the comma or full stop behind the pronoun stays
        last = words[end - 1]
        tail = last[len(last.rstrip(string.punctuation)) :]
        pair = (text, " ".join([*words[:place], noun + tail, *words[end:]]))
    else:
        pair = (text, f'Does "{pronoun}" stand for "{noun}"?')
    return TextExample(
        text=pair[0],
        text_pair=pair[1],
        label=values.label(record, fields.label) if fields.label else None,
        where=record.where,
    )


def _marked(
    record: Record, words: list[str], text_path: str | None, index_path: str | None
) -> tuple[int, str]:
    """Return the place of marked words and the words, which must be there in the text."""
    span = values.text(record, values.named(text_path)).strip()
    place = values.whole_number(record, values.named(index_path))
    end = place + len(span.split())
    if place < 0 or end > len(words):
        raise DataError(
            f"{record.where}: {span!r} is marked at word {place} ({index_path}), outside the "
            f"text of {len(words)} words; places count from 0"
        )
    found = " ".join(words[place:end])
    # "Ann's," is Ann
    if _bare(found) != _bare(span) and not _bare(found).startswith(f"{_bare(span)} "):
        raise DataError(
            f"{record.where}: expected {span!r} at word {place} ({index_path}), got {found!r}; "
            "places count from 0, words are divided by blanks"
        )
    return place, span


def _bare(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()
