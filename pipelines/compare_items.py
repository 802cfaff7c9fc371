"""What each test item brings to a score, for the bootstrap of a comparison.

An item is what is drawn when a test split is made. Rows about one text, such as the questions about
a passage or the predicates of a sentence, are not independent, and are one item.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from pipelines.compare_data import Items
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskKind, TaskSpec
from ptv2_core.evaluation.answers import answer_f1
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import Predictions
from ptv2_core.evaluation.metrics import spans

# the text that several rows can be about, by its name in a prepared row
SHARED_TEXT: Mapping[TaskKind, str] = {
    "multirc": "text",
    "record": "text",
    "srl": "tokens",
    "qa": "context",
}


def items_of(
    predictions: Predictions,
    split: EncodedSplit,
    task: TaskSpec,
    examples: Sequence[Mapping[str, Any]],
) -> Items:
    """Return the items of a scored split.

    Args:
        predictions: Answers in the split's order.
        split: With labels.
        task: Its kind and metric.
        examples: The prepared rows, one for each answer.
    """
    gold = rules_of(task.form).gold(split, task)
    if task.form == "values":
        pairs = [[float(p), float(g)] for p, g in zip(predictions, gold, strict=True)]
        return Items(kind="pearson", values=pairs)
    counts = _counts(predictions, gold, split, task)
    key = SHARED_TEXT.get(task.kind)
    if key is not None:
        counts = _by_text(counts, [_hashable(example[key]) for example in examples])
    elif task.form != "tokens":
        return Items(kind="mean", values=[[score] for score, *_ in counts])
    return Items(kind="f1", values=counts)


def _counts(
    predictions: Predictions, gold: Predictions, split: EncodedSplit, task: TaskSpec
) -> list[list[float]]:
    """Return `[correct, predicted, gold]` of each answer.

    A score that is a mean of answers' scores is the F1 of `[score, 1, 1]`.
    """
    pairs = list(zip(predictions, gold, strict=True))
    if task.form == "tokens":
        both = [(set(spans(found)), set(spans(wanted))) for found, wanted in pairs]
        return [
            [float(len(got & right)), float(len(got)), float(len(right))] for got, right in both
        ]
    if task.metric == "f1a":
        positive = task.labels[-1]
        return [
            [float(p == g == positive), float(p == positive), float(g == positive)]
            for p, g in pairs
        ]
    if task.metric == "f1":
        answers = [split.note(group)["answers"] for group in range(split.num_groups)]
        scores = [answer_f1(p or "", own) for p, own in zip(predictions, answers, strict=True)]
    else:
        scores = [float(p == g) for p, g in pairs]
    return [[score, 1.0, 1.0] for score in scores]


def _by_text(counts: list[list[float]], texts: Sequence[Hashable]) -> list[list[float]]:
    """Return the sums over the answers about each text, in the order the texts first come."""
    sums: dict[Hashable, list[float]] = {}
    for own, text in zip(counts, texts, strict=True):
        so_far = sums.setdefault(text, [0.0, 0.0, 0.0])
        sums[text] = [a + b for a, b in zip(so_far, own, strict=True)]
    return list(sums.values())


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, list) else value
