"""One and two texts, options and words become rows of token ids.

Letters: T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ptv2_core.data.encoding.split import IntArray
from ptv2_core.data.examples import OptionsExample, TextExample, TokensExample
from ptv2_core.errors import DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# texts that the tokenizer gets at once, which it divides among the cores
CHUNK = 1000

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What the backbone reads at once.

    Attributes:
        input_ids: `[T]`.
        token_type_ids: `[T]`.
        is_cut: Whether it was cut to the maximal length.
        word_index: `[T]`, see `EncodedSplit`; None: no words.
        num_words: Words of the example, those cut off included.
        chars: `[T, 2]`, see `EncodedSplit`; None: no text is answered with.
        read_at: The place of the mask token; -1: there is none.
        answer: First and last token of the answer, both 0 where there is none.
    """

    input_ids: IntArray
    token_type_ids: IntArray
    is_cut: bool
    word_index: IntArray | None = None
    num_words: int = 0
    chars: IntArray | None = None
    read_at: int = -1
    answer: tuple[int, int] = (0, 0)


def text_rows(
    examples: Sequence[TextExample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    keeps_second: bool,
) -> Iterator[list[Row]]:
    """Yield the row of each example.

    Args:
        examples: All of one text, or all of two.
        tokenizer: The backbone's.
        max_length: Tokens of a row at most.
        keeps_second: Whether only the first text is cut, as long as a piece of it is left;
            otherwise the longer of the two is.
    """
    firsts = [example.text for example in examples]
    seconds = [example.text_pair for example in examples if example.text_pair is not None]
    found = _encoded(firsts, seconds, tokenizer, max_length, keeps_second=keeps_second)
    return ([_row(encoded, place)] for encoded, place in found)


def option_rows(
    examples: Sequence[OptionsExample], tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> Iterator[list[Row]]:
    """Yield a row for each option of each example; arguments as above.

    The text before the options is cut, as long as a piece of it is left.
    """
    firsts = [example.text for example in examples for _ in example.options]
    seconds = [option for example in examples for option in example.options]
    found = _encoded(firsts, seconds, tokenizer, max_length, keeps_second=True)
    for example in examples:
        yield [_row(encoded, place) for encoded, place in islice(found, len(example.options))]


def word_rows(
    examples: Sequence[TokensExample], tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> Iterator[list[Row]]:
    """Yield the row of each example; arguments as above.

    A predicate's word stands again as a second text. Where the tokenizer tells texts apart, its
    own pieces are marked as of the second too, so that of two equal words one is meant.
    """
    words = [list(example.tokens) for example in examples]
    predicates = [
        [example.tokens[example.predicate]] for example in examples if example.predicate is not None
    ]
    found = _encoded(words, predicates, tokenizer, max_length, keeps_second=bool(predicates))
    for example, (encoded, place) in zip(examples, found, strict=True):
        yield [_word_row(example, encoded, place)]


def _word_row(example: TokensExample, encoded: "BatchEncoding", place: int) -> Row:
    texts, words = encoded.sequence_ids(place), encoded.word_ids(place)
    own = [
        -1 if word is None or text != 0 else word for word, text in zip(words, texts, strict=True)
    ]
    # the first piece of a word carries its tag
    first = [word if at == 0 or own[at - 1] != word else -1 for at, word in enumerate(own)]
    row = _row(encoded, place)
    if example.predicate is not None and row.token_type_ids.any():
        row.token_type_ids[np.array(own) == example.predicate] = 1
    return replace(row, word_index=np.array(first, dtype=np.int32), num_words=len(example.tokens))


def _row(encoded: "BatchEncoding", place: int) -> Row:
    return Row(
        input_ids=np.array(encoded["input_ids"][place], dtype=np.int32),
        token_type_ids=np.array(encoded["token_type_ids"][place], dtype=np.int32),
        is_cut=bool(encoded[place].overflowing),
    )


def _encoded(
    firsts: Sequence[Any],
    seconds: Sequence[Any],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    keeps_second: bool,
) -> Iterator[tuple["BatchEncoding", int]]:
    """Yield for each text, or text and second text, what holds it and its place there.

    Args:
        firsts: Texts, or lists of words.
        seconds: Likewise; empty: there are none.
        tokenizer: The backbone's.
        max_length: Tokens of a row at most.
        keeps_second: See `text_rows`.
    """
    assert len(seconds) in (0, len(firsts)), "all examples have a second text, or none has"
    if seconds:
        require_separator(tokenizer)
    for places in chunks(range(len(firsts))):
        pairs = [seconds[place] for place in places] if seconds else None
        ways = ["longest_first"] * len(places)
        if keeps_second and pairs:
            room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
            lengths = token_counts(pairs, tokenizer)
            # a tokenizer cannot cut the first text alone where no piece of it would be left
            ways = ["only_first" if length < room else "longest_first" for length in lengths]
        found: dict[int, tuple[BatchEncoding, int]] = {}
        for way in sorted(set(ways)):
            chosen = [at for at in range(len(places)) if ways[at] == way]
            encoded = tokenizer(
                [firsts[places[at]] for at in chosen],
                [pairs[at] for at in chosen] if pairs else None,
                is_split_into_words=isinstance(firsts[0], list),
                truncation=way,
                max_length=max_length,
                return_token_type_ids=True,
            )
            found |= {at: (encoded, place) for place, at in enumerate(chosen)}
        yield from (found[at] for at in range(len(places)))


def require_separator(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer whose rows do not show where a second text begins.

    Raises:
        DataError: It puts nothing between two texts.
    """
    special = tokenizer.num_special_tokens_to_add
    if special(pair=True) <= special(pair=False):
        raise DataError(
            "the backbone's tokenizer puts nothing between two texts: expected a sep_token or an "
            "eos_token in its tokenizer_config.json, or a token for a new line; name one, or take "
            "another backbone"
        )


def token_counts(texts: Sequence[Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return how many tokens each text, or list of words, has without special tokens."""
    encoded = tokenizer(
        list(texts),
        is_split_into_words=isinstance(texts[0], list),
        add_special_tokens=False,
        verbose=False,
    )
    return [len(ids) for ids in encoded["input_ids"]]


def chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield the items in order, as many at a time as the tokenizer gets at once."""
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]
