"""Metrics against published implementations."""

import random

import pytest
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as sklearn_f1

from ptv2_core.evaluation.metrics import (
    Span,
    classification_metrics,
    multirc_metrics,
    regression_metrics,
    span_counts,
    spans,
    tagging_metrics,
)

TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_tags_equal_seqeval(seed: int) -> None:
    # random tags hold I- after O and after other types, as untrained models predict them
    chance = random.Random(seed)
    rows = [chance.randint(1, 12) for _ in range(60)]
    gold = [[chance.choice(TAGS) for _ in range(size)] for size in rows]
    predicted = [
        [tag if chance.random() < 0.7 else chance.choice(TAGS) for tag in row] for row in gold
    ]
    ours = tagging_metrics(gold, predicted)
    assert ours["span_f1"] == pytest.approx(seqeval_f1(gold, predicted), abs=1e-12)
    assert ours["span_precision"] == pytest.approx(seqeval_precision(gold, predicted), abs=1e-12)
    assert ours["span_recall"] == pytest.approx(seqeval_recall(gold, predicted), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_labels_equal_scikit_learn(seed: int) -> None:
    chance = random.Random(seed)
    gold = [chance.choice("abcd") for _ in range(50)]
    predicted = [chance.choice("abcde") for _ in gold]
    ours = classification_metrics(gold, predicted)
    assert ours["accuracy"] == pytest.approx(accuracy_score(gold, predicted), abs=1e-12)
    wanted = sklearn_f1(gold, predicted, average="macro", zero_division=0.0)
    assert ours["macro_f1"] == pytest.approx(wanted, abs=1e-12)


def test_metrics_spans_are_read_as_conlleval_does() -> None:
    tags = ["I-a", "I-a", "I-b", "O", "B-a", "B-a", "I-b"]
    assert spans(tags) == [
        Span(0, 2, "a"), Span(2, 3, "b"), Span(4, 5, "a"), Span(5, 6, "a"), Span(6, 7, "b"),
    ]  # fmt: skip
    assert spans(["O", "O"]) == []


def test_metrics_count_a_span_with_a_wrong_end_as_wrong() -> None:
    counts = span_counts([["B-a", "I-a", "O"]], [["B-a", "O", "O"]])
    assert (counts["a"].correct, counts["a"].predicted, counts["a"].gold) == (0, 1, 1)


def test_metrics_without_any_span_are_zero() -> None:
    assert tagging_metrics([["O"]], [["O"]])["span_f1"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_numbers_equal_scipy(seed: int) -> None:
    chance = random.Random(seed)
    # steps of a fifth, as of human judgements, tie
    gold = [chance.randint(0, 25) / 5 for _ in range(60)]
    predicted = [round(value + chance.gauss(0, 2), 1) for value in gold]
    ours = regression_metrics(gold, predicted)
    assert ours["pearson"] == pytest.approx(pearsonr(gold, predicted).statistic, abs=1e-12)
    assert ours["spearman"] == pytest.approx(spearmanr(gold, predicted).statistic, abs=1e-12)


def test_metrics_of_equal_numbers_are_zero() -> None:
    assert regression_metrics([1.0, 2.0], [3.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert regression_metrics([], []) == {"pearson": 0.0, "spearman": 0.0}


def test_metrics_of_answers_count_questions_that_are_right_as_a_whole() -> None:
    gold = ["1", "0", "1", "1", "0", "0"]
    predicted = ["1", "0", "1", "0", "1", "0"]
    groups = [0, 0, 1, 1, 2, 3]
    ours = multirc_metrics(gold, predicted, groups=groups, positive="1")
    # 2 of 3 found, 2 of 3 said; questions 0 and 3 are right
    assert ours == {"f1a": pytest.approx(2 / 3), "em": 0.5, "accuracy": pytest.approx(4 / 6)}
    nothing = multirc_metrics(["0"], ["0"], groups=[0], positive="1")
    assert nothing == {"f1a": 0.0, "em": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_answers_equal_scikit_learn(seed: int) -> None:
    chance = random.Random(seed)
    gold = [chance.choice("01") for _ in range(80)]
    predicted = [chance.choice("01") for _ in gold]
    groups = [chance.randint(0, 20) for _ in gold]
    ours = multirc_metrics(gold, predicted, groups=groups, positive="1")
    assert ours["f1a"] == pytest.approx(sklearn_f1(gold, predicted, pos_label="1"), abs=1e-12)
    pairs = list(zip(groups, gold, predicted, strict=True))
    whole = [all(g == p for q, g, p in pairs if q == question) for question in set(groups)]
    assert ours["em"] == pytest.approx(sum(whole) / len(whole), abs=1e-12)
