"""Examples become token ids in flat arrays that can be memory-mapped: values and offsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptv2_core.data.examples import Example, TextExample, TokensExample
from ptv2_core.errors import DataError
from ptv2_core.files import replace_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """The rows of a split, one after the other.

    Attributes:
        input_ids: `[all tokens]`.
        token_type_ids: `[all tokens]`.
        word_index: `[all tokens]`: the word whose first piece the token is, else -1. Rows without
            words have only -1.
        offsets: `[rows + 1]`; row r has the tokens `offsets[r]:offsets[r + 1]`.
        labels: `[rows]`, or `[all words]`, words that were cut off included; empty without labels.
        word_offsets: `[rows + 1]`; row r has the words `word_offsets[r]:word_offsets[r + 1]`, none
            where a row is not made of words.
    """

    input_ids: IntArray
    token_type_ids: IntArray
    word_index: IntArray
    offsets: LongArray
    labels: IntArray
    word_offsets: LongArray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @property
    def has_words(self) -> bool:
        """Whether rows are made of words with a tag each."""
        return bool(self.word_offsets[-1] > 0)

    @property
    def lengths(self) -> LongArray:
        """`[rows]`: tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def save(self, folder: Path) -> None:
        """Write one `.npy` file an array; the folder appears whole or not at all."""
        with replace_directory(folder) as temporary:
            for name, array in vars(self).items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "EncodedSplit":
        """Map the arrays of `save` into memory; nothing is read before it is used.

        Raises:
            DataError: A file is missing or damaged.
        """
        arrays: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            file = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: cannot be read ({error}); run prepare again") from error
        return cls(**arrays)


@dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """What encoding did to a split.

    Attributes:
        rows: Number of rows.
        tokens: Number of tokens, special tokens included.
        longest: Tokens of the longest row.
        truncated: Rows that were cut to the maximal length.
    """

    rows: int
    tokens: int
    longest: int
    truncated: int


def encode_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    labels: Sequence[str] | None,
    max_length: int,
) -> tuple[EncodedSplit, EncodingReport]:
    """Encode examples.

    Args:
        examples: All of one kind.
        tokenizer: The backbone's, fast.
        labels: The closed label set; None encodes without labels.
        max_length: Tokens of a row at most, special tokens included; longer rows are cut and
            counted, the longer text of a pair first.

    Returns:
        The flat arrays, and a report.
    """
    index = {} if labels is None else {label: place for place, label in enumerate(labels)}
    rows = [_encode(example, tokenizer, index, max_length) for example in examples]
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    split = EncodedSplit(
        input_ids=_flat([row.input_ids for row in rows]),
        token_type_ids=_flat([row.token_type_ids for row in rows]),
        word_index=_flat([row.word_index for row in rows]),
        offsets=_offsets(lengths),
        labels=_flat([row.labels for row in rows]),
        word_offsets=_offsets(np.array([row.num_words for row in rows], dtype=np.int64)),
    )
    report = EncodingReport(
        rows=len(rows),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        truncated=sum(row.truncated for row in rows),
    )
    return split, report


@dataclass(frozen=True, kw_only=True)
class _Row:
    input_ids: list[int]
    token_type_ids: list[int]
    word_index: list[int]
    labels: list[int]
    num_words: int
    truncated: bool


def _encode(
    example: Example, tokenizer: "PreTrainedTokenizerBase", index: dict[str, int], max_length: int
) -> _Row:
    if isinstance(example, TokensExample):
        return _encode_tokens(example, tokenizer, index, max_length)
    return _encode_text(example, tokenizer, index, max_length)


def _encode_text(
    example: TextExample,
    tokenizer: "PreTrainedTokenizerBase",
    index: dict[str, int],
    max_length: int,
) -> _Row:
    encoded = tokenizer(
        example.text,
        example.text_pair,
        truncation="longest_first",
        max_length=max_length,
        return_token_type_ids=True,
        return_overflowing_tokens=True,
    )
    ids, types = encoded["input_ids"][0], encoded["token_type_ids"][0]
    return _Row(
        input_ids=ids,
        token_type_ids=types,
        word_index=[-1] * len(ids),
        labels=[] if example.label is None or not index else [index[example.label]],
        num_words=0,
        truncated=len(encoded["input_ids"]) > 1,
    )


def _encode_tokens(
    example: TokensExample,
    tokenizer: "PreTrainedTokenizerBase",
    index: dict[str, int],
    max_length: int,
) -> _Row:
    encoded = tokenizer(
        list(example.tokens),
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,
        return_overflowing_tokens=True,
    )
    ids, types = encoded["input_ids"][0], encoded["token_type_ids"][0]
    words = [-1 if word is None else word for word in encoded.word_ids(0)]
    # the first piece of a word carries its tag
    first = [
        word if place == 0 or words[place - 1] != word else -1 for place, word in enumerate(words)
    ]
    tags = example.tags if index else None
    labels = [] if tags is None else [index[tag] for tag in tags]
    return _Row(
        input_ids=ids,
        token_type_ids=types,
        word_index=first,
        labels=labels,
        num_words=len(example.tokens),
        truncated=len(encoded["input_ids"]) > 1,
    )


def _flat(rows: Sequence[Sequence[int]]) -> IntArray:
    return np.array([value for row in rows for value in row], dtype=np.int32)


def _offsets(lengths: LongArray) -> LongArray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
