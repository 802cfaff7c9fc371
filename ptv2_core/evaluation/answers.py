"""Metrics of answers in words, as the official evaluation of SQuAD 2.0 computes them."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return a text in lower case without punctuation, articles and superfluous white space."""
    plain = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


def token_f1(gold: str, predicted: str) -> float:
    """Return the F1 of the words of two normalised texts; of an empty one, whether both are."""
    wanted, got = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not wanted or not got:
        return float(wanted == got)
    common = sum((Counter(wanted) & Counter(got)).values())
    return 2 * common / (len(wanted) + len(got))


def answer_f1(predicted: str, answers: Sequence[str]) -> float:
    """Return the best F1 over the right answers; without any, whether the prediction is empty."""
    return max(token_f1(answer, predicted) for answer in _counting(answers))


def answer_em(predicted: str, answers: Sequence[str]) -> float:
    """Return 1 where a right answer is equal after normalisation, else 0; likewise."""
    wanted = {normalize_answer(answer) for answer in _counting(answers)}
    return float(normalize_answer(predicted) in wanted)


def _counting(answers: Sequence[str]) -> Sequence[str]:
    """Return the answers of which normalisation leaves something, or the empty one."""
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def squad_metrics(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `f1` and `em`, the means over questions; ReCoRD scores the chosen entities so too.

    Args:
        predicted: An answer a question, empty for none.
        answers: All that are right, none where the question has none.
    """
    pairs = list(zip(predicted, answers, strict=True))
    return {
        "f1": sum(answer_f1(text, own) for text, own in pairs) / max(len(pairs), 1),
        "em": sum(answer_em(text, own) for text, own in pairs) / max(len(pairs), 1),
    }


def best_null_threshold(
    differences: Sequence[float],
    scores: Sequence[float],
    *,
    is_answered: Sequence[bool],
    has_answer: Sequence[bool],
) -> float:
    """Return the threshold of the best mean score, found as the official evaluation finds it.

    A question stays unanswered where its difference passes the threshold. The official sweep
    begins at the threshold 0, which stands for no answers at all where differences are
    probabilities; here they may be negative, and it begins below all of them.

    Args:
        differences: Of the score of no answer and that of the best answer, a question each.
        scores: What the best answer would score.
        is_answered: Whether that answer has a text.
        has_answer: Whether the question has one.
    """
    finite = [difference for difference in differences if math.isfinite(difference)]
    threshold = min(finite, default=0.0) - 1.0
    current = best = float(sum(not has for has in has_answer))
    for place in sorted(range(len(differences)), key=lambda place: differences[place]):
        if has_answer[place]:
            current += scores[place]
        elif is_answered[place]:
            current -= 1
        if current > best:
            best, threshold = current, differences[place]
    return threshold
