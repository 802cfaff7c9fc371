"""What a way of training is, and how the ways are timed: in turn, in one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lengths import Sentences

PROMPT_LENGTH = 16

Round = Callable[[], float]
"""Trains on all sentences once and returns the seconds that took."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a way of training is given: a backbone's folder and the sentences."""

    folder: Path
    sentences: Sentences


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of training.

    Attributes:
        key: Names it in the JSON.
        name: Names it in the table.
        variants: How it can be set up, by a name. Where there are several, all are tried and the
            fastest is measured.
    """

    key: str
    name: str
    variants: Mapping[str, Callable[[Setting], Round]]


def choose(way: Way, setting: Setting) -> tuple[str, Round]:
    """Set a way up; returns the name of its fastest variant and that variant, warmed up."""
    best: tuple[float, str, Round] | None = None
    for name, make in way.variants.items():
        variant = make(setting)
        seconds = variant()
        if len(way.variants) > 1:
            seconds = variant()
        if best is None or seconds < best[0]:
            best = (seconds, name, variant)
    assert best is not None, "a way has a variant"
    return best[1], best[2]


def in_turn(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return each measure's results; a round asks all of them, one after the other."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results
