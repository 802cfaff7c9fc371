"""Score a model on an encoded split.

Letters: B rows, T tokens, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptv2_core.data.batching import IGNORED, Batch, collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit, IntArray, LongArray
from ptv2_core.data.examples import OUTSIDE
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.metrics import classification_metrics, tagging_metrics
from ptv2_core.model.backbones.base import Trunk
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team

EVALUATION_ROWS = 256
# the label number of a word that no piece stands for
CUT_OFF = -1

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
    team: Team | None = None,
) -> Evaluation:
    """Score logits on a labelled split.

    Args:
        logits_of: Gives `[B, C]` or `[B, T, C]` for a batch.
        split: Rows with labels.
        task: Its labels and metric.
        token_budget: Padded tokens of a batch at most.
        team: The processes among which the batches are divided; None: this one alone.
    """
    batches = sorted_batches(split.lengths, batch_size=EVALUATION_ROWS, token_budget=token_budget)
    if team is not None:
        batches = batches[team.rank :: team.size]
    loss, counted = 0.0, 0
    found = np.zeros(len(split.labels), dtype=np.int64)
    for rows in batches:
        batch = collate(split, rows)
        logits = logits_of(batch)
        assert batch.labels is not None, "a split to score has labels"
        labels = batch.labels.to(logits.device)
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        counted += int((labels != IGNORED).sum())
        for row, labels_of_row in zip(rows, label_ids(logits, batch, split, task), strict=True):
            start = split.word_offsets[row] if split.has_words else row
            found[start : start + len(labels_of_row)] = labels_of_row
    if team is not None:
        sums = torch.tensor([loss, counted, *found], dtype=torch.float64)
        team.sum([sums])
        loss, counted = float(sums[0]), int(sums[1])
        found = sums[2:].long().numpy()
    predictions = _named(found, split, task)
    metrics = score_predictions(predictions, gold_labels(split, task), task)
    return Evaluation(
        score=metrics[task.metric],
        loss=loss / max(counted, 1),
        metrics=metrics,
        predictions=predictions,
    )


def evaluate_model(
    model: PromptedModel,
    split: EncodedSplit,
    task: TaskSpec,
    *,
    token_budget: int,
    slot: int = 0,
    trunk_of: Callable[[LongArray, int], Trunk] | None = None,
    team: Team | None = None,
) -> Evaluation:
    """Score a slot of a model on a labelled split; the model is left in evaluation mode.

    Args:
        model: With prompt and head in the slot.
        split: As for `evaluate`, like what follows.
        task: Likewise.
        token_budget: Likewise.
        slot: Which.
        trunk_of: Gives what the layers below the slot's first prompt give for rows at a width;
            None computes it.
        team: As for `evaluate`.
    """
    model.eval()

    def logits_of(batch: Batch) -> Tensor:
        moved = batch.to(model.backbone.device)
        trunk = trunk_of(batch.rows, batch.input_ids.shape[1]) if trunk_of else None
        logits: Tensor = model(
            moved.input_ids, moved.token_mask, moved.token_type_ids, slot=slot, trunk=trunk
        )
        return logits

    return evaluate(logits_of, split, task, token_budget=token_budget, team=team)


def label_ids(logits: Tensor, batch: Batch, split: EncodedSplit, task: TaskSpec) -> list[list[int]]:
    """Return the best label's number of each row, or of each of its words; -1 where cut off."""
    best = logits.argmax(dim=-1).cpu()
    if task.kind == "classification":
        return [[place] for place in best.tolist()]
    rows: list[list[int]] = []
    for row, places, words in zip(
        batch.rows, best.tolist(), batch.word_index.tolist(), strict=True
    ):
        tags = [CUT_OFF] * int(split.word_offsets[row + 1] - split.word_offsets[row])
        for place, word in zip(places, words, strict=True):
            if word >= 0:
                tags[word] = place
        rows.append(tags)
    return rows


def decode(
    logits: Tensor, batch: Batch, split: EncodedSplit, task: TaskSpec
) -> Sequence[str | list[str]]:
    """Return the best label of each row, or each row's tags; words cut off are outside."""
    rows = label_ids(logits, batch, split, task)
    if task.kind == "classification":
        return [task.labels[place] for (place,) in rows]
    names = (*task.labels, OUTSIDE)  # at -1
    return [[names[place] for place in row] for row in rows]


def gold_labels(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return the split's own labels in the form of predictions."""
    return _named(split.labels, split, task)


def _named(labels: IntArray | LongArray, split: EncodedSplit, task: TaskSpec) -> Predictions:
    names = np.array([*task.labels, OUTSIDE], dtype=object)  # outside at -1
    if task.kind == "classification":
        return [str(name) for name in names[labels]]
    edges = split.word_offsets
    return [list(names[labels[edges[r] : edges[r + 1]]]) for r in range(len(split))]


def score_predictions(
    predictions: Predictions, gold: Predictions, task: TaskSpec
) -> dict[str, float]:
    """Return all metrics of the task's kind."""
    if task.kind == "classification":
        return classification_metrics(gold, predictions)  # type: ignore[arg-type]
    return tagging_metrics(gold, predictions)
