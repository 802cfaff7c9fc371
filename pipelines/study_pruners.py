"""Optuna: which trials are given up early, as a pure function of the scores in the study."""

import binascii
import math
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from pipelines.schema import SearchSettings

INTERRUPTED = "interrupted"
RETRY_OF = "retry_of"


def new_pruner(search: SearchSettings) -> optuna.pruners.BasePruner:
    """Return what gives trials up early, none before its grace is over."""
    first = max(1, search.grace_epochs)
    if search.pruner == "none":
        return optuna.pruners.NopPruner()
    if search.pruner == "successive_halving":
        return Halving(first)
    if search.pruner == "hyperband":
        return Halving(first, brackets=max(1, search.epochs // first).bit_length())
    return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=search.grace_epochs)


class Halving(optuna.pruners.BasePruner):
    """Successive halving, and with several brackets Hyperband: the better half passes each rung.

    It decides as Optuna's pruners do, which however note each rung that a trial has reached. Asked
    again after a process died, they take a rung for passed that was not, and the notes of a trial
    that was interrupted count beside those of its retry. Here the score of a rung's epoch is the
    note, and so the answer is the same however often it is asked for.
    """

    def __init__(self, first: int, *, brackets: int = 1) -> None:
        """Set the rungs.

        Args:
            first: Epoch of the first rung; each further one is at twice the epochs.
            brackets: How many; the first rung of a bracket is the second one of that before.
        """
        self._first = first
        # as many trials begin in a bracket as make its cost that of the others
        self._shares = [math.ceil(brackets * 2**s / (s + 1)) for s in reversed(range(brackets))]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Tell whether the trial is at a rung, and in the worse half of those that reached it."""
        epoch = trial.last_step
        if epoch is None:
            return False
        rung, rest = divmod(epoch, self._first)
        if rest or rung & (rung - 1) or not rung:
            return False
        trials = study.get_trials(deepcopy=False)
        brackets = self._brackets(study.study_name, trials)
        if rung < 2 ** brackets[trial.number]:
            return False
        score = trial.intermediate_values[epoch]
        others = [
            one.intermediate_values.get(epoch, math.nan)
            for one in trials
            if one.number != trial.number
            and brackets[one.number] == brackets[trial.number]
            and INTERRUPTED not in one.user_attrs
        ]
        scores = sorted([score, *(other for other in others if not math.isnan(other))])
        return math.isnan(score) or score < scores[-max(1, len(scores) // 2)]

    def _brackets(self, name: str, trials: Sequence[FrozenTrial]) -> dict[int, int]:
        """Return each trial's bracket, which its number decides, as in Optuna."""
        spans = [sum(self._shares[:end]) for end in range(1, len(self._shares) + 1)]
        found: dict[int, int] = {}
        for number, place in _places(trials).items():
            at = binascii.crc32(f"{name}_{place}".encode()) % spans[-1]
            found[number] = next(bracket for bracket, end in enumerate(spans) if at < end)
        return found


def _places(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Return the number that each trial would have if no process had died before it."""
    found: dict[int, int] = {}
    retries = 0
    for one in trials:
        if RETRY_OF in one.user_attrs:
            found[one.number] = found[one.user_attrs[RETRY_OF]]
            retries += 1
        else:
            found[one.number] = one.number - retries
    return found
