"""Whether a new version of a prompt takes the champion's place. Pure: tags in, a decision out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

CHAMPION = "champion"
CHALLENGER = "challenger"
FORMAT_TAG = "number_format"
"""The tag that says in which number format the backbone was, as scores depend on it."""
ROUNDED = "+"
"""Stands in the names of formats whose weights are rounded to 8 or 4 bits."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Whether a version became the champion, and why.

    Attributes:
        promoted: Whether the alias moved to this version now.
        reason: One or two sentences for people.
        metric: What was compared.
        score: This version's test score.
        margin: How much more than the champion's it had to be.
        champion_version: The champion that was met; none where there was none.
        champion_score: Its test score.
    """

    promoted: bool
    reason: str
    metric: str
    score: float
    margin: float
    champion_version: int | None = None
    champion_score: float | None = None


def decide(
    *,
    task: str,
    version: int,
    scores: Mapping[str, str],
    champion: int | None,
    champion_scores: Mapping[str, str],
    margin: float,
) -> Gate:
    """Decide whether a version takes the champion's place; higher scores are better.

    Args:
        task: Whose.
        version: The challenger.
        scores: Its tags `metric`, `test_score`, `test_digest` and, as far as known, FORMAT_TAG.
        champion: The version with the alias, or none.
        champion_scores: Its tags.
        margin: The challenger's score must be more than this above the champion's.
    """
    metric, score = scores["metric"], float(scores["test_score"])
    met = _champion_score(champion_scores)

    def gate(promoted: bool, reason: str) -> Gate:
        return Gate(
            promoted=promoted,
            reason=reason,
            metric=metric,
            score=score,
            margin=margin,
            champion_version=champion,
            champion_score=met,
        )

    by_hand = f"To prefer version {version} all the same: ptv2 promote {task}:{version}"
    if champion == version:
        return gate(False, f"version {version} is the champion already")
    if not math.isfinite(score):
        return gate(False, f"test {metric} is {score}: expected a number; evaluate again")
    if champion is None:
        return gate(True, f"the first champion, with test {metric} {score:.4f}")
    if met is None:
        return gate(False, f"champion version {champion} has no test score to compare. {by_hand}")
    if champion_scores.get("metric") != metric:
        other = champion_scores.get("metric")
        return gate(
            False,
            f"not comparable: champion version {champion} was scored by {other}, version {version} "
            f"by {metric}. {by_hand}",
        )
    if champion_scores.get("test_digest") != scores["test_digest"]:
        return gate(
            False,
            f"not comparable: champion version {champion} was scored on another test split. "
            f"Evaluate and register its prompt on this split, too, then register this one again. "
            f"{by_hand}",
        )
    ours, theirs = scores.get(FORMAT_TAG, ""), champion_scores.get(FORMAT_TAG, "")
    if ours != theirs and ROUNDED in ours + theirs:
        return gate(
            False,
            f"not comparable: champion version {champion} was scored on a backbone in "
            f"{theirs or 'a format that was not noted'}, version {version} in "
            f"{ours or 'one that was not noted'}. Evaluate and register both in the same "
            f"(backbone.precision). {by_hand}",
        )
    bar = f"the {met:.4f} of champion version {champion}" + (f" + {margin:g}" if margin else "")
    if score > met + margin:
        return gate(True, f"test {metric} {score:.4f} is above {bar}")
    return gate(False, f"test {metric} {score:.4f} is not above {bar}")


def _champion_score(tags: Mapping[str, str]) -> float | None:
    try:
        score = float(tags.get("test_score", "nan"))
    except ValueError:
        return None
    return score if math.isfinite(score) else None
