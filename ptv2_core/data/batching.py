"""Length-bucketed batches under a token budget; their order is a function of (seed, epoch).

Letters: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ptv2_core.data.encoding import EncodedSplit, LongArray

IGNORED = -100

# rows that are sorted by length together: long enough to save padding, short enough to shuffle
POOL_BATCHES = 20


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a split, padded on the right.

    Attributes:
        rows: `[B]`, the rows' places in the split.
        input_ids: `[B, T]`.
        token_mask: `[B, T]`, true at real tokens.
        token_type_ids: `[B, T]`, or None where all are zero.
        labels: None without labels, else by the task's form: `[B]` class numbers, numbers, or 1
            for right options; `[B, T]` with -100 where no tag is; `[B, 2]` first and last token
            of the answer.
        word_index: `[B, T]`: the word whose first piece the token is, else -1.
        groups: `[B]`, rows of one number are answered as one, dense from 0 as the batch was made;
            None where each row is answered alone.
        read_at: `[B]`, the mask token's place; None where there is none.
    """

    rows: LongArray
    input_ids: Tensor
    token_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor | None
    word_index: Tensor
    groups: Tensor | None = None
    read_at: Tensor | None = None

    def take(self, places: LongArray) -> "Batch":
        """Return some rows, `places` in this batch, at the same width and with the same groups."""
        index = torch.from_numpy(places)

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return Batch(
            rows=self.rows[places],
            input_ids=self.input_ids[index],
            token_mask=self.token_mask[index],
            token_type_ids=some(self.token_type_ids),
            labels=some(self.labels),
            word_index=self.word_index[index],
            groups=some(self.groups),
            read_at=some(self.read_at),
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with what the model and the loss read on `device`."""

        def there(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return Batch(
            rows=self.rows,
            input_ids=self.input_ids.to(device),
            token_mask=self.token_mask.to(device),
            token_type_ids=there(self.token_type_ids),
            labels=there(self.labels),
            word_index=self.word_index,
            groups=there(self.groups),
            read_at=there(self.read_at),
        )


def shuffled_batches(
    lengths: LongArray, *, batch_size: int, token_budget: int, seed: int, epoch: int
) -> list[LongArray]:
    """Return the batches of one epoch, each an array of row numbers.

    Rows are shuffled, sorted by length within pools, cut into batches, and the batches shuffled.
    Of a split with units these are the rows: see `EncodedSplit.unit_lengths` and `rows_of`.

    Args:
        lengths: `[rows]`, tokens of each row.
        batch_size: Rows of a batch at most.
        token_budget: Rows times the longest of them at most; a longer row stands alone.
        seed: Of the order.
        epoch: Of the order.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    pool = batch_size * POOL_BATCHES
    batches: list[LongArray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += _cut(rows, lengths, batch_size, token_budget)
    return [batches[place] for place in generator.permutation(len(batches))]


def sorted_batches(lengths: LongArray, *, batch_size: int, token_budget: int) -> list[LongArray]:
    """Return batches of rows in order of length, for evaluation; arguments as above."""
    rows = np.argsort(lengths, kind="stable")
    return _cut(rows, lengths, batch_size, token_budget)


def _cut(
    rows: LongArray, lengths: LongArray, batch_size: int, token_budget: int
) -> list[LongArray]:
    """Cut rows of rising length into batches."""
    batches: list[LongArray] = []
    start = 0
    for end in range(1, len(rows) + 1):
        is_last = end == len(rows)
        full = end - start == batch_size
        over = not is_last and (end - start + 1) * lengths[rows[end]] > token_budget
        if is_last or full or over:
            batches.append(rows[start:end])
            start = end
    return batches


def collate(split: EncodedSplit, rows: LongArray) -> Batch:
    """Pad rows of a split into a batch.

    Args:
        split: Encoded rows.
        rows: Their places.
    """
    spans = [slice(split.offsets[row], split.offsets[row + 1]) for row in rows]
    lengths = split.lengths[rows]
    width = int(lengths.max())
    word_index = _pad([split.word_index[span] for span in spans], width, -1)
    types = _pad([split.token_type_ids[span] for span in spans], width, 0)
    return Batch(
        rows=rows,
        input_ids=_pad([split.input_ids[span] for span in spans], width, 0),
        token_mask=torch.arange(width)[None, :] < torch.from_numpy(lengths)[:, None],
        token_type_ids=types if bool(types.any()) else None,
        labels=_labels(split, rows, word_index),
        word_index=word_index,
        groups=_groups(split, rows),
        read_at=torch.from_numpy(split.read_at[rows]) if len(split.read_at) else None,
    )


def _groups(split: EncodedSplit, rows: LongArray) -> Tensor | None:
    if not len(split.units):
        return None
    return torch.from_numpy(np.unique(split.groups[rows], return_inverse=True)[1])


def _labels(split: EncodedSplit, rows: LongArray, word_index: Tensor) -> Tensor | None:
    if not len(split.labels):
        return None
    if not split.has_words:
        is_number = np.issubdtype(split.labels.dtype, np.floating)
        return torch.from_numpy(split.labels[rows].astype(np.float32 if is_number else np.int64))
    words = [slice(split.word_offsets[row], split.word_offsets[row + 1]) for row in rows]
    longest = max(span.stop - span.start for span in words)
    by_word = _pad([split.labels[span] for span in words], longest, IGNORED)  # [B, words]
    tags = by_word.gather(1, word_index.clamp(min=0))  # [B, T]
    return tags.masked_fill(word_index < 0, IGNORED)


def _pad(rows: Sequence[np.ndarray], width: int, value: int) -> Tensor:
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
