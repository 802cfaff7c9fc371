"""What a form of task brings to the loop: its loss, what is kept of the logits, answers, scores.

The loop of training and evaluation knows this and no kind of task.

Letters: B rows, T tokens, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ptv2_core.data.batching import Batch
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec

Outcomes = npt.NDArray[np.float64]
Decoding = Mapping[str, float]
"""Settings of an answer that dev chooses, such as `null_threshold`; empty for most forms."""
Predictions = Sequence[Any]
"""An answer a group, in their order: a label, a number, an option's name, tags, a text. MultiRC
answers each row."""


class FormRules(Protocol):
    """One form."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the losses of a batch, in nats (values: squared error).

        Args:
            logits: `[B, C]`, `[B, T, C]`, `[B, 1]` or `[B, T, 2]`.
            batch: With labels, on the device of the logits.
        """
        ...

    def count(self, batch: Batch) -> int:
        """Return over how many labels of a batch the loss is a mean."""
        ...

    def outcome_offsets(self, split: EncodedSplit) -> LongArray:
        """`[rows + 1]`: where each row's outcomes stand among those of the split."""
        ...

    def outcomes(self, logits: Tensor, batch: Batch, split: EncodedSplit) -> list[Outcomes]:
        """Return what is kept of each row's logits: numbers from which all answers are made."""
        ...

    def decoding(self, outcomes: Outcomes, split: EncodedSplit, task: TaskSpec) -> Decoding:
        """Choose the settings of an answer on a labelled split.

        Args:
            outcomes: Of all rows, one after the other.
            split: With labels.
            task: Its labels and metric.
        """
        ...

    def predictions(
        self, outcomes: Outcomes, split: EncodedSplit, task: TaskSpec, decoding: Decoding
    ) -> Predictions:
        """Return the answers of a split."""
        ...

    def gold(self, split: EncodedSplit, task: TaskSpec) -> Predictions:
        """Return the split's own answers, in the form of predictions."""
        ...

    def metrics(
        self, predictions: Predictions, split: EncodedSplit, task: TaskSpec
    ) -> dict[str, float]:
        """Return all metrics of the task's kind; the task's own is among them."""
        ...
