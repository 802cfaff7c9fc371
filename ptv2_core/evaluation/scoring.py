"""Score a model on an encoded split.

Letters: B rows, T tokens, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ptv2_core.data.batching import Batch, collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import Decoding, Predictions
from ptv2_core.model.backbones.base import Trunk
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team

EVALUATION_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on a split.

    Attributes:
        score: The task's metric.
        loss: Mean loss over what the task's form counts.
        metrics: All metrics of the task's kind.
        predictions: The answers, in the split's order.
        decoding: The settings of an answer that were used; empty for most forms.
    """

    score: float
    loss: float
    metrics: dict[str, float]
    predictions: Predictions
    decoding: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Batch], Tensor],
    split: EncodedSplit,
    task: TaskSpec,
    *,
    token_budget: int,
    team: Team | None = None,
    decoding: Decoding | None = None,
) -> Evaluation:
    """Score logits on a labelled split.

    Args:
        logits_of: Gives what a head of the task's form gives for a batch.
        split: Rows with labels.
        task: Its labels and metric.
        token_budget: Padded tokens of a batch at most.
        team: The processes among which the batches are divided; None: this one alone.
        decoding: Settings of an answer; None chooses them on this split, as only dev may.
    """
    rules = rules_of(task.form)
    batches = sorted_batches(
        split.unit_lengths, batch_size=EVALUATION_ROWS, token_budget=token_budget
    )
    if team is not None:
        batches = batches[team.rank :: team.size]
    loss, counted = 0.0, 0
    offsets = rules.outcome_offsets(split)
    found = np.zeros(offsets[-1], dtype=np.float64)
    for units in batches:
        batch = collate(split, split.rows_of(units))
        logits = logits_of(batch)
        loss += float(rules.loss(logits, batch.to(logits.device)))
        counted += rules.count(batch)
        for row, outcomes in zip(batch.rows, rules.outcomes(logits, batch, split), strict=True):
            found[offsets[row] : offsets[row + 1]] = outcomes
    if team is not None:
        sums = torch.from_numpy(np.concatenate([[loss, counted], found]))
        team.sum([sums])
        loss, counted, found = float(sums[0]), int(sums[1]), sums[2:].numpy()
    chosen = rules.decoding(found, split, task) if decoding is None else decoding
    predictions = rules.predictions(found, split, task, chosen)
    metrics = rules.metrics(predictions, split, task)
    return Evaluation(
        score=metrics[task.metric],
        loss=loss / max(counted, 1),
        metrics=metrics,
        predictions=predictions,
        decoding=chosen,
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
    decoding: Decoding | None = None,
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
        decoding: Likewise.
    """
    model.eval()

    def logits_of(batch: Batch) -> Tensor:
        trunk = trunk_of(batch.rows, batch.input_ids.shape[1]) if trunk_of else None
        return logits_of_batch(model, batch, slot=slot, trunk=trunk)

    return evaluate(logits_of, split, task, token_budget=token_budget, team=team, decoding=decoding)


def logits_of_batch(
    model: PromptedModel, batch: Batch, *, slot: int = 0, trunk: Trunk | None = None
) -> Tensor:
    """Return the logits of a slot for a batch, on the model's device."""
    moved = batch.to(model.backbone.device)
    logits: Tensor = model(
        moved.input_ids,
        moved.token_mask,
        moved.token_type_ids,
        slot=slot,
        trunk=trunk,
        read_at=moved.read_at,
    )
    return logits


def gold_labels(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return the split's own answers in the form of predictions."""
    return rules_of(task.form).gold(split, task)


def score_predictions(
    predictions: Predictions, split: EncodedSplit, task: TaskSpec
) -> dict[str, float]:
    """Return all metrics of predictions for a labelled split."""
    return rules_of(task.form).metrics(predictions, split, task)
