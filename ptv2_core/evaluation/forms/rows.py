"""A class a row.

Letters: B rows, C classes.
"""

import numpy as np
from torch import Tensor, nn

from ptv2_core.data.batching import Batch
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.forms.base import Decoding, Outcomes, Predictions
from ptv2_core.evaluation.metrics import classification_metrics, multirc_metrics


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of `[B, C]` logits."""
    assert batch.labels is not None, "rows to learn from have labels"
    return nn.functional.cross_entropy(logits.float(), batch.labels, reduction="sum")


def count(batch: Batch) -> int:
    """Return the number of rows."""
    return len(batch.rows)


def outcome_offsets(split: EncodedSplit) -> LongArray:
    """`[rows + 1]`: one outcome a row."""
    return np.arange(len(split) + 1)


def outcomes(logits: Tensor, batch: Batch, split: EncodedSplit) -> list[Outcomes]:
    """Return the number of each row's best class."""
    return list(logits.argmax(dim=-1).cpu().double().numpy()[:, None])


def decoding(outcomes: Outcomes, split: EncodedSplit, task: TaskSpec) -> Decoding:
    """Return nothing: the best class is the answer."""
    return {}


def predictions(
    outcomes: Outcomes, split: EncodedSplit, task: TaskSpec, decoding: Decoding
) -> Predictions:
    """Return a class's name a row."""
    return [task.labels[number] for number in outcomes.astype(np.int64)]


def gold(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return the name of each row's own class."""
    return [task.labels[number] for number in split.labels]


def metrics(predictions: Predictions, split: EncodedSplit, task: TaskSpec) -> dict[str, float]:
    """Return accuracy and macro F1; for MultiRC F1a, EM and accuracy."""
    own = gold(split, task)
    if task.kind == "multirc":
        groups = split.groups.tolist()
        return multirc_metrics(own, predictions, groups=groups, positive=task.labels[-1])
    return classification_metrics(own, predictions)
