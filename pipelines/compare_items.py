"""What each test item brings to a score, for the bootstrap of a comparison."""

import numpy as np

from pipelines.compare_data import Items
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.answers import answer_f1
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import Predictions
from ptv2_core.evaluation.metrics import spans


def items_of(predictions: Predictions, split: EncodedSplit, task: TaskSpec) -> Items:
    """Return the items of a scored split.

    Args:
        predictions: Answers in the split's order.
        split: With labels.
        task: Its kind and metric.
    """
    gold = rules_of(task.form).gold(split, task)
    if task.kind == "multirc":
        return _of_groups(predictions, gold, split, task)
    if task.form == "tokens":
        counts = []
        for found, wanted in zip(predictions, gold, strict=True):
            got, right = set(spans(found)), set(spans(wanted))
            counts.append([float(len(got & right)), float(len(got)), float(len(right))])
        return Items(kind="f1", values=counts)
    if task.form == "values":
        pairs = [[float(p), float(g)] for p, g in zip(predictions, gold, strict=True)]
        return Items(kind="pearson", values=pairs)
    if task.metric == "f1":
        answers = [split.note(group)["answers"] for group in range(split.num_groups)]
        scores = [answer_f1(p or "", own) for p, own in zip(predictions, answers, strict=True)]
    else:
        scores = [float(p == g) for p, g in zip(predictions, gold, strict=True)]
    return Items(kind="mean", values=[[score] for score in scores])


def _of_groups(
    predictions: Predictions, gold: Predictions, split: EncodedSplit, task: TaskSpec
) -> Items:
    """Return counts of the positive class by question: its answers are not independent."""
    positive = task.labels[-1]
    counts = np.zeros((split.num_groups, 3))
    found = np.array([answer == positive for answer in predictions])
    wanted = np.array([answer == positive for answer in gold])
    for column, hits in enumerate((found & wanted, found, wanted)):
        np.add.at(counts[:, column], split.groups, hits)
    return Items(kind="f1", values=counts.tolist())
