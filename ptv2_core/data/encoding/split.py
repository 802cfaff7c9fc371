"""The rows of a split as flat arrays that can be memory-mapped: values and offsets."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptv2_core.errors import DataError
from ptv2_core.files import replace_directory

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """The rows of a split, one after the other.

    A row is what the backbone reads at once. Several rows can be one group, which is answered and
    scored as one: the options of a choice, the windows of a long context.

    Attributes:
        input_ids: `[all tokens]`.
        token_type_ids: `[all tokens]`.
        word_index: `[all tokens]`: the word whose first piece the token is, else -1. Rows without
            words have only -1.
        offsets: `[rows + 1]`; row r has the tokens `offsets[r]:offsets[r + 1]`.
        labels: Empty without labels, else by the task's form: rows `[rows]`, class numbers;
            values `[rows]`, float32; options `[rows]`, 1 for right options; tokens `[all words]`,
            words that were cut off included; spans `[rows, 2]`, first and last token of the
            answer in the row, both 0 where it has none.
        word_offsets: `[rows + 1]`; row r has the words `word_offsets[r]:word_offsets[r + 1]`, none
            where a row is not made of words.
        groups: `[rows]`, the group of each row, numbered from 0 by first appearance; empty: each
            row is its own.
        units: `[units + 1]`; rows `units[u]:units[u + 1]` must be in one batch; empty: each row
            may stand alone.
        chars: `[all tokens, 2]`, where a context's token begins and ends in its text, -1 for all
            other tokens; empty where no text is answered with.
        notes: UTF-8 bytes of a JSON object a group, one after the other: what scoring needs of
            the texts (`context`, `answers`, `names`, `id`).
        note_offsets: `[groups + 1]`; empty without notes.
        read_at: `[rows]`, the token that a head reading `mask` reads; empty where there is none.
    """

    input_ids: IntArray
    token_type_ids: IntArray
    word_index: IntArray
    offsets: LongArray
    labels: npt.NDArray[Any]
    word_offsets: LongArray
    groups: LongArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    units: LongArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    chars: IntArray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32))
    notes: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    note_offsets: LongArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    read_at: LongArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @property
    def num_groups(self) -> int:
        """How many answers the split wants."""
        return int(self.groups.max()) + 1 if len(self.groups) else len(self)

    def note(self, group: int) -> dict[str, Any]:
        """Return what scoring needs of a group's texts; empty without notes."""
        if not len(self.note_offsets):
            return {}
        span = slice(self.note_offsets[group], self.note_offsets[group + 1])
        found: dict[str, Any] = json.loads(self.notes[span].tobytes())
        return found

    @property
    def unit_lengths(self) -> LongArray:
        """`[units]`: tokens of each unit, all of its rows as long as its longest."""
        if not len(self.units):
            return self.lengths
        longest = np.maximum.reduceat(self.lengths, self.units[:-1])
        return longest * np.diff(self.units)

    def rows_of(self, units: LongArray) -> LongArray:
        """Return the rows of some units, in their order."""
        if not len(self.units):
            return units
        rows = [np.arange(self.units[unit], self.units[unit + 1]) for unit in units]
        return np.concatenate(rows)

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
        truncated: Rows that were cut to the maximal length; a window is not cut.
        groups: How many answers are wanted.
        windows: Rows beyond one a question, of contexts that are longer than a row.
    """

    rows: int
    tokens: int
    longest: int
    truncated: int
    groups: int
    windows: int
