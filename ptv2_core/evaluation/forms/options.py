"""One of a group of rows.

Letters: B rows, G groups.
"""

import numpy as np
import torch
from torch import Tensor

from ptv2_core.data.batching import Batch
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.answers import squad_metrics
from ptv2_core.evaluation.forms.base import Decoding, Outcomes, Predictions


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the sum over groups of -log of the summed probability of the right options.

    Groups without a right option, which no answer could be right for, do not count.

    Args:
        logits: `[B, 1]`, a score an option.
        batch: Its groups lie in it whole.
    """
    assert batch.labels is not None, "options to learn from have labels"
    scores = _by_group(logits[:, 0].float(), batch, -torch.inf)
    right = _by_group(batch.labels == 1, batch, False)
    is_counted = right.any(dim=1)
    scores, right = scores[is_counted], right[is_counted]
    chosen = torch.where(right, scores, -torch.inf)
    return (scores.logsumexp(dim=1) - chosen.logsumexp(dim=1)).sum()


def _by_group(values: Tensor, batch: Batch, fill: float | bool) -> Tensor:
    """`[B]` -> `[G, options]`, filled up where a group has fewer; a group's rows are neighbours."""
    assert batch.groups is not None, "a split of options has units"
    _, group, counts = torch.unique_consecutive(
        batch.groups, return_inverse=True, return_counts=True
    )
    starts = counts.cumsum(dim=0) - counts
    place = torch.arange(len(group), device=group.device) - starts[group]
    table = values.new_full((len(counts), int(counts.max())), fill)
    return table.index_put((group, place), values)


def count(batch: Batch) -> int:
    """Return the number of groups with a right option."""
    assert batch.labels is not None, "options to learn from have labels"
    return int(_by_group(batch.labels == 1, batch, False).any(dim=1).sum())


def outcome_offsets(split: EncodedSplit) -> LongArray:
    """`[rows + 1]`: one outcome a row."""
    return np.arange(len(split) + 1)


def outcomes(logits: Tensor, batch: Batch, split: EncodedSplit) -> list[Outcomes]:
    """Return each option's score."""
    return list(logits.detach().cpu().double().numpy())


def decoding(outcomes: Outcomes, split: EncodedSplit, task: TaskSpec) -> Decoding:
    """Return nothing: the option of the highest score is the answer."""
    return {}


def predictions(
    outcomes: Outcomes, split: EncodedSplit, task: TaskSpec, decoding: Decoding
) -> Predictions:
    """Return the name of each group's best option, the first of equal ones."""
    edges = split.units
    return [
        split.note(group)["names"][int(outcomes[edges[group] : edges[group + 1]].argmax())]
        for group in range(split.num_groups)
    ]


def gold(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return the name of each group's first right option; none where no option is right."""
    return [names[0] if names else None for names in _right_names(split)]


def _right_names(split: EncodedSplit) -> list[list[str]]:
    edges = split.units
    return [
        [
            name
            for name, label in zip(
                split.note(group)["names"],
                split.labels[edges[group] : edges[group + 1]],
                strict=True,
            )
            if label
        ]
        for group in range(split.num_groups)
    ]


def metrics(predictions: Predictions, split: EncodedSplit, task: TaskSpec) -> dict[str, float]:
    """Return accuracy; for ReCoRD F1 and EM, the maximum over the answers, and accuracy."""
    hits = [name in names for name, names in zip(predictions, _right_names(split), strict=True)]
    shares = {"accuracy": sum(hits) / max(len(hits), 1)}
    if task.kind == "record":
        answers = [split.note(group)["answers"] for group in range(split.num_groups)]
        return squad_metrics(predictions, answers) | shares
    return shares
