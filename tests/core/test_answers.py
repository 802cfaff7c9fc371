"""Answers in words: edge cases of SQuAD's scores by hand, and random ones against an oracle."""

import random

import pytest

from ptv2_core.evaluation.answers import (
    answer_em,
    answer_f1,
    best_null_threshold,
    normalize_answer,
    squad_metrics,
)
from tests.core import squad_oracle as oracle

# text, answers, F1, EM
CASES: list[tuple[str, list[str], float, float]] = [
    ("the Eiffel Tower", ["Eiffel Tower"], 1.0, 1.0),
    ("An  apple.", ["apple"], 1.0, 1.0),
    ("U.S.A.", ["usa"], 1.0, 1.0),
    ("theatre", ["the atre"], 0.0, 0.0),
    ("Saint-Denis", ["Saint Denis"], 0.0, 0.0),
    ("10 million dollars", ["10 million", "ten million dollars"], 0.8, 0.0),
    ("a b c", ["b c d", "c"], 0.8, 0.0),
    ("cat cat dog", ["cat"], 0.5, 0.0),
    ("cat", ["dog", "cat", "bird"], 1.0, 1.0),
    ("", [], 1.0, 1.0),
    ("cat", [], 0.0, 0.0),
    ("", ["cat"], 0.0, 0.0),
    # of these nothing is left, so that no answer is the right one
    ("", ["the", "!"], 1.0, 1.0),
    ("the", [], 1.0, 1.0),
    ("the", ["cat"], 0.0, 0.0),
    ("caf\u00e9 \u2013 bar", ["CAF\u00c9 \u2013 bar"], 1.0, 1.0),
]


@pytest.mark.parametrize(("text", "answers", "f1", "em"), CASES)
def test_answers_score_edge_cases_as_squad_defines_them(
    text: str, answers: list[str], f1: float, em: float
) -> None:
    assert answer_f1(text, answers) == pytest.approx(f1)
    assert answer_em(text, answers) == em
    assert oracle.best_em(text, answers) == em
    assert oracle.best_f1(text, answers) == pytest.approx(f1)


WORDS = ["the", "a", "An", "cat,", "Cat", "dog!", "b-c", "", "  ", "tower", "U.S.", "\u00fcber"]


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_random_words_score_as_the_oracle(seed: int) -> None:
    chance = random.Random(seed)

    def text() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(0, 5)))

    predicted = [text() for _ in range(200)]
    answers = [[text() for _ in range(chance.randint(0, 3))] for _ in predicted]
    pairs = list(zip(predicted, answers, strict=True))
    ours = squad_metrics(predicted, answers)
    assert ours["em"] == pytest.approx(sum(oracle.best_em(*p) for p in pairs) / 200, abs=1e-12)
    assert ours["f1"] == pytest.approx(sum(oracle.best_f1(*p) for p in pairs) / 200, abs=1e-12)
    assert [normalize_answer(one).split() for one in predicted] == [
        oracle.plain_words(one) for one in predicted
    ]


@pytest.mark.parametrize("seed", range(20))
def test_null_threshold_is_the_first_of_the_best_mean(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 40)
    differences = [chance.uniform(-5, 5) for _ in range(count)]
    has_answer = [chance.random() < 0.5 for _ in range(count)]
    answered = [chance.random() < 0.7 for _ in range(count)]
    scores = [
        chance.choice([0.0, 0.5, 1.0]) if has and said else float(not has and not said)
        for has, said in zip(has_answer, answered, strict=True)
    ]
    found = best_null_threshold(differences, scores, is_answered=answered, has_answer=has_answer)
    candidates = [min(differences) - 1, *sorted(differences)]
    means = [oracle.mean_at(one, differences, scores, has_answer) for one in candidates]
    # sums of halves are exact, means of them are not
    best = max(means) - 1e-12
    assert found == next(one for one, mean in zip(candidates, means, strict=True) if mean >= best)


def test_null_threshold_takes_questions_of_one_difference_in_their_order() -> None:
    # after the first two all count as right; the third spoils it, though the threshold is its own
    settings = {"is_answered": [True, True, True], "has_answer": [True, True, False]}
    assert best_null_threshold([1.0, 2.0, 2.0], [1.0, 1.0, 0.0], **settings) == 2.0


def test_null_threshold_leaves_all_unanswered_where_that_is_best() -> None:
    threshold = best_null_threshold(
        [-5.0, -1.0], [0.0, 0.0], is_answered=[True, True], has_answer=[False, True]
    )
    assert threshold < -5.0
