"""The sentences that every way trains on: real RTE and BoolQ pairs, or rows of their lengths.

The data sets are looked for in `PTV2_BENCH_DATA`, by default `../shared/data` beside the project.
Where they are not there, the rows hold random words and have the lengths documented in `SOURCES`.
Either way the rows are those of whole length buckets: batches at even places in the order of length
of the training set, each spread over a twentieth of it, as bucketing in pools of 20 batches gives
in an epoch. So padding is that of a training, and no luck of a draw is in the figures.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.data import data_folder
from ptv2_core.data.batching import POOL_BATCHES

MAX_LENGTH = 128
BATCH_SIZE = 32
NUM_CLASSES = 2
SEED = 1

Rows = list[int]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set in SuperGLUE's form.

    Attributes:
        fields: The names of the pair's two texts.
        num_rows: Training pairs.
        quantiles: Tokens of a pair at 0, 5, ... 100 % of them, by the WordPiece tokenizer that
            BERT uncased and MiniLM share, special tokens included and before any cut.
    """

    fields: tuple[str, str]
    num_rows: int
    quantiles: tuple[int, ...]


SOURCES: Mapping[str, Source] = {
    # mean 70.1 tokens, 66.5 when cut to 128; 12 % of the pairs are longer than that
    "rte": Source(
        fields=("premise", "hypothesis"),
        num_rows=2_490,
        quantiles=(
            13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 135, 157, 289,
        ),
    ),
    # mean 139.8 tokens, 108.8 when cut to 128; half of the pairs are longer than that
    "boolq": Source(
        fields=("question", "passage"),
        num_rows=9_427,
        quantiles=(
            24, 55, 67, 76, 85, 92, 99, 106, 113, 120, 128, 136, 143, 151, 161, 172, 186, 203, 224,
            266, 915,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One encoded pair with the number of its class."""

    input_ids: list[int]
    token_type_ids: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """The rows of one table.

    Attributes:
        name: Of the data set.
        origin: Where rows and lengths are from, in words.
        rows: The same for every way.
    """

    name: str
    origin: str
    rows: list[Sentence]

    @property
    def lengths(self) -> np.ndarray:
        """`[rows]`: tokens of each row."""
        return np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Real tokens, without any padding."""
        return int(self.lengths.sum())

    def in_random_order(self) -> list[Rows]:
        """Return batches of `BATCH_SIZE` rows in random order."""
        return self._cut(np.random.default_rng(SEED).permutation(len(self.rows)))

    def grouped(self) -> list[Rows]:
        """Return batches of rows of like length, in random order."""
        batches = self._cut(np.argsort(self.lengths, kind="stable"))
        return [batches[place] for place in np.random.default_rng(SEED).permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[Rows]:
        starts = range(0, len(order), BATCH_SIZE)
        return [order[start : start + BATCH_SIZE].tolist() for start in starts]

    def tensors(self, rows: Rows, *, width: int | None = None) -> dict[str, Tensor]:
        """Return what a Transformers classifier takes, padded to `width` or the longest row."""
        longest = max(len(self.rows[row].input_ids) for row in rows) if width is None else width
        batch = {
            name: torch.zeros(len(rows), longest, dtype=torch.long)
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
        for place, row in enumerate(rows):
            sentence = self.rows[row]
            length = len(sentence.input_ids)
            batch["input_ids"][place, :length] = torch.tensor(sentence.input_ids)
            batch["token_type_ids"][place, :length] = torch.tensor(sentence.token_type_ids)
            batch["attention_mask"][place, :length] = 1
        return {**batch, "labels": torch.tensor([self.rows[row].label for row in rows])}


def sentences(name: str, count: int, tokenizer: PreTrainedTokenizerBase) -> Sentences:
    """Return `count` rows of a data set, or of its documented lengths.

    Args:
        name: A key of `SOURCES`.
        count: How many rows.
        tokenizer: BERT's, uncased.
    """
    file = data_folder() / name / "train.jsonl"
    if file.is_file():
        rows = _real(file, SOURCES[name], count, tokenizer)
        origin = f"{count} of {SOURCES[name].num_rows:,} training pairs of {name}"
    else:
        rows = _made(SOURCES[name], count, tokenizer)
        origin = f"{count} rows of random words with the documented lengths of {name}"
    return Sentences(name=name, origin=origin, rows=rows)


def _real(
    file: Path, source: Source, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Sentence]:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    labels = sorted({str(record["label"]) for record in records})
    encoded = tokenizer(
        [record[source.fields[0]] for record in records],
        [record[source.fields[1]] for record in records],
        truncation="longest_first",
        max_length=MAX_LENGTH,
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = np.argsort(lengths, kind="stable")
    places = _shares(count) * len(order)
    return [
        Sentence(
            input_ids=encoded["input_ids"][row],
            token_type_ids=encoded["token_type_ids"][row],
            label=labels.index(str(records[row]["label"])),
        )
        for row in order[places.astype(int)]
    ]


def _shares(count: int) -> np.ndarray:
    """Return each row's place in the order of length, from 0 to 1, one bucket after the other."""
    num_batches = -(-count // BATCH_SIZE)
    middles = (np.arange(num_batches) + 0.5) / num_batches
    inside = ((np.arange(BATCH_SIZE) + 0.5) / BATCH_SIZE - 0.5) / POOL_BATCHES
    return (middles[:, None] + inside[None, :]).flatten()[:count]


def _made(source: Source, count: int, tokenizer: PreTrainedTokenizerBase) -> list[Sentence]:
    generator = np.random.default_rng(SEED)
    shares = _shares(count)
    known = np.linspace(0.0, 1.0, len(source.quantiles))
    lengths = np.interp(shares, known, source.quantiles).astype(int).clip(max=MAX_LENGTH)
    words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    rows = []
    for place, length in enumerate(lengths):
        inner = generator.choice(words, size=length - 2).tolist()
        second = length // 4  # tokens of the pair's second text
        rows.append(
            Sentence(
                input_ids=[tokenizer.cls_token_id, *inner, tokenizer.sep_token_id],
                token_type_ids=[0] * (length - second) + [1] * second,
                label=place % NUM_CLASSES,
            )
        )
    return rows
