"""How a sweep stands at one moment, for those who watch it, and how long it will take."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipelines.sweep.record import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Look:
    """A sweep at one moment.

    Attributes:
        task: The task.
        asked: Trials that were asked for.
        ended: Those that are over.
        running: Those that train, with their scores so far.
        finalists_left: Trainings with further seeds that are still to come; 0 before that round.
        seconds_left: An estimate; None while nothing is known.
    """

    task: str
    asked: int
    ended: tuple[TrialRecord, ...]
    running: tuple[TrialRecord, ...]
    finalists_left: int
    seconds_left: float | None


OnLook = Callable[[Look], None]


def seconds_left(
    trials_s: Mapping[int, float],
    finalists_s: Sequence[float],
    *,
    complete: Collection[int],
    trials_left: int,
    finalists_left: int,
    workers: int,
) -> float | None:
    """Estimate how long a sweep will take; None while nothing is known.

    Args:
        trials_s: How long trials took, by number, in this process: what a dead sweep began may
            have lain idle for days.
        finalists_s: The same of trainings with further seeds.
        complete: Trials that nobody pruned. A finalist takes as long as one of them.
        trials_left: Trials to come, those that run included.
        finalists_left: Trainings with further seeds to come.
        workers: Trainings side by side.
    """
    full_s = [*finalists_s, *(took for number, took in trials_s.items() if number in complete)]
    any_s = [*trials_s.values()] or full_s
    if not any_s:
        return None
    trial_s, finalist_s = fmean(any_s), fmean(full_s or any_s)
    return (trials_left * trial_s + finalists_left * finalist_s) / workers
