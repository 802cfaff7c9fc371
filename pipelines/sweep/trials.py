"""Optuna: the study of a sweep, in a database that outlives every process that works on it.

A trial that is running when its sweep dies is no trial lost: it keeps its number and what was
drawn, and the next sweep takes it over. So a study has exactly as many trials as were asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipelines.paths import alone
from pipelines.schema import SearchSettings
from pipelines.study import FINISHED, new_sampler, suggest
from pipelines.study_pruners import new_pruner
from pipelines.sweep.record import Origin, TrialRecord
from pipelines.sweep.record import TrialState as State
from pipelines.sweep.serverlock import ServerLock
from pipelines.sweep.storages import open_storage, patiently
from pipelines.sweep.supervise import Ended

ORIGIN, STATE, RETRIES, MESSAGE = "origin", "state", "retries", "message"
STOP = "stop"
TASK, SEEDED = "task", "seeded"
SEED_PREFIX = "seed"
BEGUN = "begun"
LOST = "its worker was lost"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial that is to be trained.

    Attributes:
        number: Its number in the study.
        params: What was drawn, by the names of the space.
        is_taken_over: Whether an earlier process began it.
    """

    number: int
    params: dict[str, Any]
    is_taken_over: bool


class SweepStudy:
    """The study of one sweep."""

    def __init__(self, url: str, name: str, search: SearchSettings) -> None:
        """Open or make it.

        Args:
            url: Of the database.
            name: Changes with everything a trial depends on, so that studies never mix.
            search: Space, pruner and seed.

        Raises:
            PipelineError: The database cannot be used.
        """
        self.url = url
        self.name = name
        self._search = search
        opened = open_storage(url)
        self._study = patiently(
            lambda: optuna.create_study(
                study_name=name,
                storage=opened,
                direction="maximize",
                load_if_exists=True,
                pruner=new_pruner(search),
            )
        )
        # with Optuna's memory of what has ended in front of it
        self._storage = self._study._storage
        self._ids: dict[int, int] = {}
        self._active: set[int] = set()
        self._server_lock: ServerLock | None = None

    @contextmanager
    def held(self, lock: Path) -> Iterator[None]:
        """Hold the study alone, against other sweeps on this machine and on others.

        Raises:
            PipelineError: Another sweep holds it.
        """
        with alone(lock, "sweep"):
            if not self.url.startswith("postgresql"):
                yield
                return
            lock_of_server = ServerLock(self.url, self.name)
            try:
                patiently(lock_of_server.take)
                self._server_lock = lock_of_server
                yield
            finally:
                self._server_lock = None
                lock_of_server.release()

    def begin(
        self,
        task: str,
        baseline: Mapping[str, Any],
        first: Sequence[Mapping[str, Any]],
        transfer: int,
    ) -> None:
        """Queue what is tried before anything is drawn; a study that has begun is left alone.

        Args:
            task: The study's task.
            baseline: The settings of `train`, by the names of the space.
            first: Those of `search.first`.
            transfer: How many of earlier studies, at most.
        """
        patiently(lambda: self._begin_study(task, baseline, first, transfer))

    def _begin_study(
        self,
        task: str,
        baseline: Mapping[str, Any],
        first: Sequence[Mapping[str, Any]],
        transfer: int,
    ) -> None:
        if self._study.user_attrs.get(SEEDED):
            return
        earlier = self._earlier(task, transfer, [baseline, *first]) if transfer else []
        queued: list[tuple[Origin, Mapping[str, Any]]] = [
            ("baseline", baseline),
            *(("first", one) for one in first),
            *(("transferred", one) for one in earlier),
        ]
        for origin, params in queued:
            if params and self._search.space.contains(params):
                self._study.enqueue_trial(
                    dict(params), user_attrs={ORIGIN: origin}, skip_if_exists=True
                )
        self._study.set_user_attr(TASK, task)
        self._study.set_user_attr(SEEDED, True)

    def _earlier(
        self, task: str, count: int, known: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the best settings of other studies: this task's first, the newest first."""
        names = set(self._search.space.model_dump(exclude_none=True))
        found: list[tuple[bool, datetime, list[dict[str, Any]]]] = []
        for summary in optuna.get_all_study_summaries(self._storage, include_best_trial=False):
            if summary.study_name == self.name or TASK not in summary.user_attrs:
                continue
            study = optuna.load_study(study_name=summary.study_name, storage=self._storage)
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            ranked = sorted(complete, key=lambda one: -(one.value or 0.0))
            fitting = [
                dict(one.params)
                for one in ranked
                if set(one.params) == names and self._search.space.contains(one.params)
            ]
            # a study whose sweep died early has no trial that began, and no date
            if fitting and summary.datetime_start is not None:
                is_same = summary.user_attrs[TASK] == task
                found.append((is_same, summary.datetime_start, fitting))
        found.sort(key=lambda one: (one[0], one[1]), reverse=True)
        # the best of each study, then the second best of each, and so on
        rounds = zip_longest(*(fitting for *_, fitting in found))
        best: list[dict[str, Any]] = []
        for one in (one for turn in rounds for one in turn):
            # studies pass their best on to each other: it is tried once, and leaves its place
            if one is not None and one not in best and one not in known:
                best.append(one)
        return best[:count]

    def ask(self, n_trials: int) -> Asked | None:
        """Return a trial to train: one that a dead sweep left, or a new one.

        Args:
            n_trials: How many the study is to have; None is returned where it has them.
        """
        return patiently(lambda: self._ask(n_trials))

    def _ask(self, n_trials: int) -> Asked | None:
        if self._server_lock is not None:
            self._server_lock.take()
        frozen = self._study.get_trials(deepcopy=False)
        left = [
            one.number
            for one in frozen
            if one.state == TrialState.RUNNING and one.number not in self._active
        ]
        if left:
            self._study.sampler = new_sampler(self._search.seed, left[0])
            trial = self._trial(left[0])
            self._draw_again(trial)
            return self._begin(trial, is_taken_over=True)
        begun = sum(one.state in (*FINISHED, TrialState.RUNNING) for one in frozen)
        if begun >= n_trials:
            return None
        self._study.sampler = new_sampler(self._search.seed, begun)
        return self._begin(self._study.ask(), is_taken_over=False)

    def _draw_again(self, trial: optuna.Trial) -> None:
        """Bring the sampler to where it was when a process died that had drawn some settings."""
        frozen = self._frozen(trial.number)
        is_whole = set(frozen.params) == set(self._search.space.model_dump(exclude_none=True))
        # those of a model are drawn at once, those by chance one after the other
        if not is_whole and not trial.relative_params:
            for name, distribution in frozen.distributions.items():
                self._study.sampler.sample_independent(self._study, frozen, name, distribution)

    def _begin(self, trial: optuna.Trial, *, is_taken_over: bool) -> Asked:
        # what was drawn before is not drawn again: Optuna keeps it
        params = suggest(trial, self._search.space)
        self._active.add(trial.number)
        return Asked(number=trial.number, params=params, is_taken_over=is_taken_over)

    def report(self, number: int, epoch: int, score: float) -> bool:
        """Note the score of an epoch; returns whether the trial is to be given up."""
        return patiently(lambda: self._report(number, epoch, score))

    def _report(self, number: int, epoch: int, score: float) -> bool:
        trial = self._trial(number)
        known = trial._cached_frozen_trial.intermediate_values
        # a checkpoint may be older than what was told, and judged, before a process died
        if epoch < max(known, default=0):
            return False
        if epoch not in known:
            trial.report(score, epoch)
        return epoch < self._search.epochs and trial.should_prune()

    def crashed(self, number: int, why: str) -> None:
        """Note that a trial's process died; it is tried again."""
        before = self.retries(number)
        self._note(number, RETRIES, before + 1)
        self._note(number, MESSAGE, why)

    def begun(self, number: int) -> None:
        """Note that a worker trains a trial."""
        self._note(number, BEGUN, True)

    def lost(self, number: int) -> bool:
        """Note that a trial's worker was lost; returns whether one had begun to train it."""
        if not patiently(lambda: self._frozen(number)).user_attrs.get(BEGUN):
            return False
        self._note(number, BEGUN, False)
        self.crashed(number, LOST)
        return True

    def retries(self, number: int) -> int:
        """Return how often a trial's process died, under earlier sweeps too."""
        return int(patiently(lambda: self._frozen(number)).user_attrs.get(RETRIES, 0))

    def set_stop(self, number: int, why: str) -> None:
        """Note what keeps a trial, and any other, from going on; it has not ended."""
        # of the study, since that of a finalist's trial cannot be written any more
        patiently(lambda: self._study.set_user_attr(f"{STOP}:{number}", why))

    def take_stop(self, number: int) -> str:
        """Return what was noted, and strike it out; empty where there is nothing."""
        why = str(patiently(lambda: self._study.user_attrs).get(f"{STOP}:{number}", ""))
        if why:
            self.set_stop(number, "")
        return why

    def tell(self, number: int, ended: Ended) -> None:
        """Write down how a trial ended; told twice, it counts once."""
        patiently(lambda: self._tell(number, ended))
        self._active.discard(number)

    def _tell(self, number: int, ended: Ended) -> None:
        frozen = self._frozen(number)
        if frozen.state.is_finished():
            return
        # all other states are Optuna's own, and each note is a commit
        if ended.state == "crashed":
            self._note(number, STATE, ended.state)
        if ended.message != frozen.user_attrs.get(MESSAGE, ""):
            self._note(number, MESSAGE, ended.message)
        scores = frozen.intermediate_values.values()
        if ended.state == "complete" and scores:
            self._study.tell(number, max(scores), skip_if_finished=True)
        elif ended.state == "pruned":
            self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def hold(self, number: int) -> None:
        """Take a trial up again that was released."""
        self._active.add(number)

    def release(self, number: int) -> bool:
        """Let a trial go that no process of this sweep works on; returns whether it has ended."""
        self._active.discard(number)
        return bool(patiently(lambda: self._frozen(number)).state.is_finished())

    def running(self) -> tuple[TrialRecord, ...]:
        """Return the trials that this sweep is training, with their scores so far."""
        frozen = patiently(lambda: self._study.get_trials(deepcopy=False))
        return tuple(_record(one) for one in frozen if one.number in self._active)

    def trials(self) -> tuple[TrialRecord, ...]:
        """Return the trials that ended, by number."""
        frozen = patiently(lambda: self._study.get_trials(deepcopy=False, states=FINISHED))
        return tuple(map(_record, frozen))

    def why_stop(self, patience: int | None, margin: float) -> str:
        """Return why no further trial is worth its time; empty where one is.

        Args:
            patience: Trials on end that may bring no gain; None: all may.
            margin: What counts as a gain of the score.
        """
        # one that failed or crashed says nothing of what is still to be gained
        trials = [one for one in self.trials() if one.state in ("complete", "pruned")]
        if patience is None or len(trials) <= patience:
            return ""
        best, late = _best(trials[:-patience]), _best(trials[-patience:])
        if best is None or (late is not None and late > best + margin):
            return ""
        return f"none of the last {patience} trials gained more than {margin:g} on dev"

    def seed_scores(self) -> dict[tuple[int, int], float | None]:
        """Return the scores of finalists by trial and seed; none where a training failed."""
        attrs = patiently(lambda: self._study.user_attrs)
        found: dict[tuple[int, int], float | None] = {}
        for name, score in attrs.items():
            prefix, _, rest = name.partition(":")
            if prefix == SEED_PREFIX:
                number, _, seed = rest.partition(":")
                found[int(number), int(seed)] = None if score is None else float(score)
        return found

    def note(self, key: str, value: Any) -> None:
        """Write an attribute of the study, for those who work on its trials."""
        patiently(lambda: self._study.set_user_attr(key, value))

    def noted(self) -> dict[str, Any]:
        """Return all attributes of the study."""
        return patiently(lambda: self._study.user_attrs)

    def set_seed_score(self, number: int, seed: int, score: float | None) -> None:
        """Keep the score of a finalist with one more seed; none where it failed."""
        patiently(lambda: self._study.set_user_attr(_seed_key(number, seed), score))

    def has_seed(self, number: int, seed: int) -> bool:
        """Tell whether a finalist's training with a seed has ended, well or not."""
        return _seed_key(number, seed) in patiently(lambda: self._study.user_attrs)

    def _note(self, number: int, key: str, value: Any) -> None:
        patiently(lambda: self._storage.set_trial_user_attr(self._id(number), key, value))

    def _frozen(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._id(number))

    def _trial(self, number: int) -> optuna.Trial:
        return optuna.trial.Trial(self._study, self._id(number))

    def _id(self, number: int) -> int:
        if number not in self._ids:
            study = self._study._study_id
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        return self._ids[number]


def _seed_key(number: int, seed: int) -> str:
    return f"{SEED_PREFIX}:{number}:{seed}"


def _best(trials: Sequence[TrialRecord]) -> float | None:
    """Return the best score of those that can win: what was pruned cannot, whatever it reached."""
    scores = [one.value for one in trials if one.state == "complete" and one.value is not None]
    return max(scores, default=None)


def _record(frozen: FrozenTrial) -> TrialRecord:
    attrs = frozen.user_attrs
    scores = tuple(frozen.intermediate_values[step] for step in sorted(frozen.intermediate_values))
    by_optuna: dict[TrialState, State] = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
    }
    state = by_optuna.get(frozen.state, "crashed" if attrs.get(STATE) == "crashed" else "failed")
    has_value = scores and state in ("complete", "pruned")
    return TrialRecord(
        number=frozen.number,
        state=state,
        params=dict(frozen.params),
        origin=attrs.get(ORIGIN, "drawn"),
        epochs=scores,
        value=max(scores) if has_value else None,
        seconds=frozen.duration.total_seconds() if frozen.duration else 0.0,
        retries=int(attrs.get(RETRIES, 0)),
        message=str(attrs.get(MESSAGE, "")),
    )
