"""SQuAD's scores computed slowly from their definition: an oracle for answers in words."""

from collections.abc import Sequence

PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def plain_words(text: str) -> list[str]:
    """Return the words that are compared: no capitals, no ASCII punctuation, no articles.

    An article is left out wherever letters, digits and underscores do not go on on either side.
    """
    kept = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    words, run = [""], ""
    for letter in f"{kept} ":
        if letter.isalnum() or letter == "_":
            run += letter
            continue
        words[-1] += " " if run in ("a", "an", "the") else run
        words[-1] += letter
        run = ""
    return words[0].split()


def f1(gold: str, predicted: str) -> float:
    """Return the harmonic mean of the shares of words that the two have in common."""
    wanted, got = plain_words(gold), plain_words(predicted)
    if not wanted or not got:
        return 1.0 if wanted == got else 0.0
    left, common = list(wanted), 0
    for word in got:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def best_f1(predicted: str, answers: Sequence[str]) -> float:
    """Return the F1 for the answer that is nearest; without answers, none is right."""
    return max(f1(answer, predicted) for answer in wanted_answers(answers))


def best_em(predicted: str, answers: Sequence[str]) -> float:
    """Return whether the words of an answer are the same, in their order."""
    words = plain_words(predicted)
    return max(float(plain_words(answer) == words) for answer in wanted_answers(answers))


def wanted_answers(answers: Sequence[str]) -> list[str]:
    """Return the answers that have words, or the empty one."""
    return [answer for answer in answers if plain_words(answer)] or [""]


def mean_at(
    threshold: float,
    differences: Sequence[float],
    scores: Sequence[float],
    has_answer: Sequence[bool],
) -> float:
    """Return the mean score where questions with a greater difference stay unanswered."""
    found = [
        float(not has) if difference > threshold else score
        for difference, score, has in zip(differences, scores, has_answer, strict=True)
    ]
    return sum(found) / len(found)
