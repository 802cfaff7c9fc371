"""What runs on an engine for one trial: supervise its training, and write to the study."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pipelines.schema import SearchSettings
from pipelines.sweep.hosts import CannotGoOnError
from pipelines.sweep.job import Job
from pipelines.sweep.supervise import Ended, Supervisor
from pipelines.sweep.trials import SweepStudy


@dataclass(frozen=True, kw_only=True)
class Order:
    """A training that the sweep asks an engine for; plain values, so that it travels.

    Attributes:
        url: Of the study's database; engines log what they are given, and it may hold a password.
        study: Its name.
        search: As JSON: space, pruner and seed.
        number: Of the trial.
        job: What to train.
        retries: How often its process may die.
        is_finalist: Whether a finished trial is trained again with the job's seed.
    """

    url: str = field(repr=False)
    study: str
    search: str
    number: int
    job: Job
    retries: int
    is_finalist: bool


OnScore = Callable[[int, float], None]
"""Called with an epoch and its score on dev, for those who watch."""

IDLE_S = 300.0
"""How long a worker that outlives the sweep keeps processes that nobody gives work to."""

_lock = threading.Lock()
_supervisors: dict[str, Supervisor] = {}
_training: Counter[str] = Counter()
_idle: dict[str, threading.Timer] = {}


def supervisor(study: str) -> Supervisor:
    """Return this process's supervisor of a study's trials."""
    with _lock:
        return _supervisors.setdefault(study, Supervisor())


def begin(study: str) -> None:
    """Let this process train for a study, again where that was ended."""
    with _lock:
        _supervisors.pop(study, None)


def end(study: str) -> None:
    """Kill what this process trains for a study, and train no more until `begin`."""
    # it stays in its place: a thread that comes late would train a whole trial in a new one
    supervisor(study).end()


@lru_cache(maxsize=8)
def _study(url: str, name: str, search: str) -> SweepStudy:
    return SweepStudy(url, name, SearchSettings.model_validate_json(search))


def study_of(order: Order) -> SweepStudy:
    """Return the study that a training writes to.

    Raises:
        PipelineError: Its database does not answer, or cannot be used.
    """
    return _study(order.url, order.study, order.search)


def train(order: Order, on_score: OnScore = lambda epoch, score: None) -> Ended:
    """Train to the end, and write down how it ended.

    Args:
        order: What to train.
        on_score: Called once for each epoch, those before a checkpoint too.

    Raises:
        PipelineError: The sweep is ending, the study's database is gone, or no trial can go on.
    """
    study = study_of(order)
    with _at_work(order.study):
        return _train_or_say(order, study, on_score)


@contextmanager
def _at_work(study: str) -> Iterator[None]:
    """Keep what trains for a study while it is used, and for a while after."""
    with _lock:
        _training[study] += 1
        if study in _idle:
            _idle.pop(study).cancel()
    try:
        yield
    finally:
        with _lock:
            _training[study] -= 1
            if not _training[study]:
                timer = _idle[study] = threading.Timer(IDLE_S, _end_idle, (study,))
                timer.daemon = True
                timer.start()


def _end_idle(study: str) -> None:
    with _lock:
        found = None if _training[study] else _supervisors.pop(study, None)
    if found is not None:
        found.end()


def _train_or_say(order: Order, study: SweepStudy, on_score: OnScore) -> Ended:
    train_one = _train_finalist if order.is_finalist else _train_trial
    try:
        return train_one(order, study, on_score)
    except CannotGoOnError as error:
        # the sweep waits in another process, perhaps on another machine
        study.set_stop(order.number, str(error))
        raise


def _train_trial(order: Order, study: SweepStudy, on_score: OnScore) -> Ended:
    def on_epoch(epoch: int, score: float) -> bool:
        on_score(epoch, score)
        return study.report(order.number, epoch, score)

    study.begun(order.number)
    before = study.retries(order.number)
    ended = supervisor(order.study).run(
        order.job,
        on_epoch,
        retries=max(0, order.retries - before),
        on_crash=lambda why: study.crashed(order.number, why),
    )
    study.tell(order.number, ended)
    Path(order.job.checkpoint).unlink(missing_ok=True)
    return ended


def _train_finalist(order: Order, study: SweepStudy, on_score: OnScore) -> Ended:
    scores: list[float] = []

    def on_epoch(epoch: int, score: float) -> bool:
        on_score(epoch, score)
        scores.append(score)
        return False

    assert order.job.seed is not None, "a finalist is trained with a seed of its own"
    ended = supervisor(order.study).run(order.job, on_epoch, retries=order.retries)
    score = max(scores) if ended.state == "complete" else None
    study.set_seed_score(order.number, order.job.seed, score)
    Path(order.job.checkpoint).unlink(missing_ok=True)
    return ended
