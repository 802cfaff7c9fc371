"""A number a row.

Letters: B rows.
"""

import numpy as np
from torch import Tensor, nn

from ptv2_core.data.batching import Batch
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.forms.base import Decoding, Outcomes, Predictions
from ptv2_core.evaluation.metrics import regression_metrics


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the squared error of `[B, 1]` numbers."""
    assert batch.labels is not None, "rows to learn from have labels"
    return nn.functional.mse_loss(logits[:, 0].float(), batch.labels, reduction="sum")


def count(batch: Batch) -> int:
    """Return the number of rows."""
    return len(batch.rows)


def outcome_offsets(split: EncodedSplit) -> LongArray:
    """`[rows + 1]`: one outcome a row."""
    return np.arange(len(split) + 1)


def outcomes(logits: Tensor, batch: Batch, split: EncodedSplit) -> list[Outcomes]:
    """Return each row's number."""
    return list(logits.detach().cpu().double().numpy())


def decoding(outcomes: Outcomes, split: EncodedSplit, task: TaskSpec) -> Decoding:
    """Return nothing: the number is the answer."""
    return {}


def predictions(
    outcomes: Outcomes, split: EncodedSplit, task: TaskSpec, decoding: Decoding
) -> Predictions:
    """Return each row's number."""
    numbers: list[float] = outcomes.tolist()
    return numbers


def gold(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return each row's own number."""
    numbers: list[float] = split.labels.tolist()
    return numbers


def metrics(predictions: Predictions, split: EncodedSplit, task: TaskSpec) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation."""
    return regression_metrics(gold(split, task), predictions)
