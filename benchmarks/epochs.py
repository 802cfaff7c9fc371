"""The arithmetic of a sweep's cost: epochs spent until a score was reached. No training here."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

Curve = Sequence[float]
"""The scores of one trial, epoch by epoch, as far as it was trained."""

ROUNDING = 1e-9
"""Scores that differ by less are the same: a target is a difference of two floats."""


def spent_until(curves: Sequence[Curve], target: float) -> int | None:
    """Return the epochs that trials spent up to the first one with a score, that one included.

    Args:
        curves: Of the trials, in the order in which one worker trained them.
        target: The score.

    Returns:
        None where no trial reached it.
    """
    spent = 0
    for curve in curves:
        for score in curve:
            spent += 1
            if score >= target - ROUNDING:
                return spent
    return None


def spent(curves: Sequence[Curve]) -> int:
    """Return the epochs of all trials."""
    return sum(map(len, curves))


def best(curves: Sequence[Curve]) -> float:
    """Return the best score of all epochs.

    Raises:
        ValueError: Nothing was trained.
    """
    return max(score for curve in curves for score in curve)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times fewer epochs ours needed than a peer.

    Attributes:
        value: Peer's epochs over ours, the medians over the seeds; None where ours did not get
            there with every seed.
        is_bound: Whether the peer did not get there with some seed, so that the epochs it had are
            counted and the true ratio is higher.
        peer: Epochs of the peer, a seed each.
        ours: Epochs of ours, a seed each; None: never.
    """

    value: float | None
    is_bound: bool
    peer: tuple[int, ...]
    ours: tuple[int | None, ...]


def ratio(
    peer: Sequence[Sequence[Curve]], ours: Sequence[Sequence[Curve]], targets: Sequence[float]
) -> Ratio:
    """Compare two ways of searching.

    Args:
        peer: The trials' curves of each seed.
        ours: Likewise.
        targets: The score that both are to reach, a seed each.
    """
    until = [spent_until(*one) for one in zip(peer, targets, strict=True)]
    theirs = [
        spent(curves) if found is None else found for found, curves in zip(until, peer, strict=True)
    ]
    own = [spent_until(*one) for one in zip(ours, targets, strict=True)]
    reached = [found for found in own if found is not None]
    value = median(theirs) / median(reached) if reached and len(reached) == len(own) else None
    return Ratio(value=value, is_bound=None in until, peer=tuple(theirs), ours=tuple(own))


def overall(ratios: Sequence[Ratio]) -> float | None:
    """Return the geometric mean over the tasks; None where ours failed in one of them."""
    values = [one.value for one in ratios if one.value is not None]
    if not values or len(values) < len(ratios):
        return None
    return float(prod(values) ** (1 / len(values)))
