"""Score a model on an encoded split.

Letters: B rows, T tokens, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptv2_core.data.batching import IGNORED, Batch, collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.examples import OUTSIDE
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.metrics import classification_metrics, tagging_metrics
from ptv2_core.model.prompted import PromptedModel

EVALUATION_ROWS = 256

Predictions = list[str] | list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on a split.

    Attributes:
        score: The task's metric.
        loss: Mean cross-entropy over rows or tagged tokens, in nats.
        metrics: All metrics of the task's kind.
        predictions: A label a row, or a row of tags, in the split's order.
    """

    score: float
    loss: float
    metrics: dict[str, float]
    predictions: Predictions


def cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the loss of `[B, C]` or `[B, T, C]` logits; labels of -100 do not count."""
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Batch], Tensor],
    split: EncodedSplit,
    task: TaskSpec,
    *,
    token_budget: int,
) -> Evaluation:
    """Score logits on a labelled split.

    Args:
        logits_of: Gives `[B, C]` or `[B, T, C]` for a batch.
        split: Rows with labels.
        task: Its labels and metric.
        token_budget: Padded tokens of a batch at most.
    """
    loss, counted = 0.0, 0
    answers: dict[int, str | list[str]] = {}
    for rows in sorted_batches(
        split.lengths, batch_size=EVALUATION_ROWS, token_budget=token_budget
    ):
        batch = collate(split, rows)
        logits = logits_of(batch)
        assert batch.labels is not None, "a split to score has labels"
        labels = batch.labels.to(logits.device)
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        counted += int((labels != IGNORED).sum())
        answers.update(zip(rows.tolist(), decode(logits, batch, split, task), strict=True))
    predictions = [answers[row] for row in range(len(split))]
    metrics = score_predictions(predictions, gold_labels(split, task), task)  # type: ignore[arg-type]
    return Evaluation(
        score=metrics[task.metric],
        loss=loss / max(counted, 1),
        metrics=metrics,
        predictions=predictions,  # type: ignore[arg-type]
    )


def evaluate_model(
    model: PromptedModel, split: EncodedSplit, task: TaskSpec, *, token_budget: int
) -> Evaluation:
    """Score slot 0 of a model on a labelled split; the model is left in evaluation mode."""
    model.eval()

    def logits_of(batch: Batch) -> Tensor:
        moved = batch.to(model.backbone.device)
        logits: Tensor = model(moved.input_ids, moved.token_mask, moved.token_type_ids)
        return logits

    return evaluate(logits_of, split, task, token_budget=token_budget)


def decode(
    logits: Tensor, batch: Batch, split: EncodedSplit, task: TaskSpec
) -> Sequence[str | list[str]]:
    """Return the best label of each row, or each row's tags; words cut off are outside."""
    best = logits.argmax(dim=-1).cpu()
    if task.kind == "classification":
        return [task.labels[place] for place in best.tolist()]
    rows: list[str | list[str]] = []
    for row, places, words in zip(
        batch.rows, best.tolist(), batch.word_index.tolist(), strict=True
    ):
        tags = [OUTSIDE] * int(split.word_offsets[row + 1] - split.word_offsets[row])
        for place, word in zip(places, words, strict=True):
            if word >= 0:
                tags[word] = task.labels[place]
        rows.append(tags)
    return rows


def gold_labels(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return the split's own labels in the form of predictions."""
    names = np.array(task.labels, dtype=object)
    if task.kind == "classification":
        return [str(name) for name in names[split.labels]]
    edges = split.word_offsets
    return [list(names[split.labels[edges[r] : edges[r + 1]]]) for r in range(len(split))]


def score_predictions(
    predictions: Predictions, gold: Predictions, task: TaskSpec
) -> dict[str, float]:
    """Return all metrics of the task's kind."""
    if task.kind == "classification":
        return classification_metrics(gold, predictions)  # type: ignore[arg-type]
    return tagging_metrics(gold, predictions)
