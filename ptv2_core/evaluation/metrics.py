"""Metrics: pure functions of gold and predicted labels; higher is better for all of them."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptv2_core.data.examples import OUTSIDE

Tags = Sequence[str]


@dataclass(frozen=True, order=True)
class Span:
    """A typed stretch of tokens.

    Attributes:
        start: First token.
        end: One past the last token.
        type: The type's name.
    """

    start: int
    end: int
    type: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Spans of one type, or of all.

    Attributes:
        correct: Predicted with the right type and ends.
        predicted: Predicted at all.
        gold: In the data.
    """

    correct: int
    predicted: int
    gold: int

    @property
    def precision(self) -> float:
        """Share of the predicted that are correct; 0 where none is predicted."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the gold that are found; 0 where there is none."""
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where both are."""
        total = self.predicted + self.gold
        return 2 * self.correct / total if total else 0.0


def accuracy(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the share of equal labels; 0 for no rows."""
    hits = sum(g == p for g, p in zip(gold, predicted, strict=True))
    return hits / len(gold) if gold else 0.0


def label_counts(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, Counts]:
    """Return counts by label that is in the data or predicted, sorted by name."""
    in_gold, in_predicted = Counter(gold), Counter(predicted)
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    return {
        name: Counts(correct=hits[name], predicted=in_predicted[name], gold=in_gold[name])
        for name in sorted({*in_gold, *in_predicted})
    }


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the mean F1 over the labels that are in the data or predicted; 0 for no rows."""
    scores = [counts.f1 for counts in label_counts(gold, predicted).values()]
    return sum(scores) / len(scores) if scores else 0.0


def spans(tags: Tags) -> list[Span]:
    """Return the spans of an IOB2 row as the CoNLL evaluation reads it.

    An `I-` tag after `O`, or after another type, begins a span.
    """
    found: list[Span] = []
    start, name = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, kind = tag.partition("-")
        if name and (prefix != "I" or kind != name):
            found.append(Span(start, place, name))
            name = ""
        if not name and tag != OUTSIDE:
            start, name = place, kind
    return found


def span_counts(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, Counts]:
    """Return counts by span type, sorted by name."""
    correct: Counter[str] = Counter()
    in_predicted: Counter[str] = Counter()
    in_gold: Counter[str] = Counter()
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        wanted, got = set(spans(gold_tags)), set(spans(predicted_tags))
        correct.update(span.type for span in wanted & got)
        in_predicted.update(span.type for span in got)
        in_gold.update(span.type for span in wanted)
    return {
        name: Counts(correct=correct[name], predicted=in_predicted[name], gold=in_gold[name])
        for name in sorted({*in_gold, *in_predicted})
    }


def total_counts(by_type: Mapping[str, Counts]) -> Counts:
    """Return the sum over all types, from which the micro-averaged span F1 is computed."""
    return Counts(
        correct=sum(counts.correct for counts in by_type.values()),
        predicted=sum(counts.predicted for counts in by_type.values()),
        gold=sum(counts.gold for counts in by_type.values()),
    )


def classification_metrics(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Return `accuracy` and `macro_f1`."""
    return {"accuracy": accuracy(gold, predicted), "macro_f1": macro_f1(gold, predicted)}


def tagging_metrics(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, float]:
    """Return `span_f1`, `span_precision`, `span_recall` and `token_accuracy`."""
    total = total_counts(span_counts(gold, predicted))
    flat_gold = [tag for row in gold for tag in row]
    flat_predicted = [tag for row in predicted for tag in row]
    return {
        "span_f1": total.f1,
        "span_precision": total.precision,
        "span_recall": total.recall,
        "token_accuracy": accuracy(flat_gold, flat_predicted),
    }


def multirc_metrics(
    gold: Sequence[str],
    predicted: Sequence[str],
    *,
    groups: Sequence[Hashable],
    positive: str,
) -> dict[str, float]:
    """Return `f1a`, `em` and `accuracy` of the answers to questions with several right ones.

    Args:
        gold: Whether each answer is right, as a label.
        predicted: Likewise.
        groups: The question of each answer.
        positive: The label of right answers.

    Returns:
        F1 of the positive label over all answers; the share of questions all of whose answers are
        labelled right; the share of answers that are.
    """
    counts = label_counts(gold, predicted).get(positive)
    is_right: dict[Hashable, bool] = {}
    for group, wanted, got in zip(groups, gold, predicted, strict=True):
        is_right[group] = is_right.get(group, True) and wanted == got
    return {
        "f1a": counts.f1 if counts else 0.0,
        "em": sum(is_right.values()) / len(is_right) if is_right else 0.0,
        "accuracy": accuracy(gold, predicted),
    }


def regression_metrics(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Return `pearson` and `spearman`; 0 where all numbers of one side are equal."""
    wanted, got = np.array(gold, dtype=np.float64), np.array(predicted, dtype=np.float64)
    return {
        "pearson": _correlation(wanted, got),
        "spearman": _correlation(_ranks(wanted), _ranks(got)),
    }


def _correlation(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    if len(one) == 0 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    share = (one / np.linalg.norm(one)) @ (other / np.linalg.norm(other))
    return float(np.clip(share, -1.0, 1.0))


def _ranks(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks from 0; equal numbers share the mean of theirs."""
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[place]
