"""A class a token, from which a tag a word.

Letters: B rows, T tokens, C classes.
"""

import numpy as np
from torch import Tensor, nn

from ptv2_core.data.batching import IGNORED, Batch
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.examples import OUTSIDE
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.forms.base import Decoding, Outcomes, Predictions
from ptv2_core.evaluation.metrics import tagging_metrics

# the class number of a word that no piece stands for
CUT_OFF = -1


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of `[B, T, C]` logits at the first pieces of words."""
    assert batch.labels is not None, "rows to learn from have labels"
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),  # [B, T, C] -> [B * T, C]
        batch.labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def count(batch: Batch) -> int:
    """Return the number of words that are not cut off."""
    assert batch.labels is not None, "rows to learn from have labels"
    return int((batch.labels != IGNORED).sum())


def outcome_offsets(split: EncodedSplit) -> LongArray:
    """`[rows + 1]`: one outcome a word."""
    return split.word_offsets


def outcomes(logits: Tensor, batch: Batch, split: EncodedSplit) -> list[Outcomes]:
    """Return the number of each word's best class, -1 where the word is cut off."""
    best = logits.argmax(dim=-1).cpu().numpy()  # [B, T]
    sizes = np.diff(split.word_offsets)[batch.rows]
    found = []
    for numbers, words, size in zip(best, batch.word_index.numpy(), sizes, strict=True):
        tags = np.full(size, CUT_OFF, dtype=np.float64)
        tags[words[words >= 0]] = numbers[words >= 0]
        found.append(tags)
    return found


def decoding(outcomes: Outcomes, split: EncodedSplit, task: TaskSpec) -> Decoding:
    """Return nothing: the best class is the answer."""
    return {}


def predictions(
    outcomes: Outcomes, split: EncodedSplit, task: TaskSpec, decoding: Decoding
) -> Predictions:
    """Return the tags of each row; words that were cut off are outside."""
    return _tags(outcomes.astype(np.int64), split, task)


def gold(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return each row's own tags."""
    return _tags(split.labels, split, task)


def _tags(numbers: np.ndarray, split: EncodedSplit, task: TaskSpec) -> list[list[str]]:
    names = np.array([*task.labels, OUTSIDE], dtype=object)  # outside at -1
    edges = split.word_offsets
    return [list(names[numbers[edges[r] : edges[r + 1]]]) for r in range(len(split))]


def metrics(predictions: Predictions, split: EncodedSplit, task: TaskSpec) -> dict[str, float]:
    """Return span F1 with precision and recall, and the accuracy of tags."""
    return tagging_metrics(gold(split, task), predictions)
