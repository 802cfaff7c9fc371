"""A sweep of one task, engine aside: what is trained next, when it is over, and what it found.

Two rounds: trials until there are enough or no gain is to be expected; then the best of them with
more seeds, since one seed's luck decides between settings that are nearly as good.
"""

import queue
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import Any

from pipelines.checking import Found, check_section
from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import Settings, TaskSettings, read_environment
from pipelines.stages.search import baseline, check_space, study_name
from pipelines.stages.training import backbone_for, backbone_identity, load_start
from pipelines.study import reachable
from pipelines.sweep.job import Job, inputs_of
from pipelines.sweep.looks import Look, OnLook, seconds_left
from pipelines.sweep.proxy import one_writer
from pipelines.sweep.record import Finalist, SweepRecord, TrialRecord, in_words
from pipelines.sweep.supervise import Ended
from pipelines.sweep.training import Order, begin
from pipelines.sweep.trials import LOST, Asked, SweepStudy
from pipelines.sweep.urls import host_and_port, with_driver
from ptv2_core.errors import ConfigError
from ptv2_core.training.stack import check_shares_forward

LOOK_S = 1.0
"""How often what runs is looked at, for those who watch."""

Done = Callable[[], None]
Submit = Callable[[str, Order, Done], None]
"""Starts a training under a name; calls back from any thread once it is over, however it ended."""


class Sweep:
    """One task's sweep, opened and alone on its study."""

    def __init__(
        self, settings: TaskSettings, sweep: SweepSettings, paths: TaskPaths, study: SweepStudy
    ) -> None:
        """Hold what `opened` made."""
        self.settings = settings
        self.sweep = sweep
        self.paths = paths
        self.study = study
        self.folder = paths.root / ".ptv2" / "sweeps" / settings.name / study.name
        self._orders: dict[str, Order] = {}
        self._resubmitted: dict[str, int] = {}
        self._began = time.monotonic()
        self._stopped = ""
        self._trials_s: dict[int, float] = {}
        self._finalists_s: list[float] = []
        self.url = study.url
        self.inputs: dict[str, str] = {}
        self.device = "cpu"

    def order(self, asked: Asked, *, seed: int | None = None) -> Order:
        """Return the training of a trial; with a seed, that of a finalist."""
        name = f"trial-{asked.number}" + ("" if seed is None else f"-seed-{seed}")
        shares = self.sweep.engine == "stack"
        return Order(
            url=self.url,
            study=self.study.name,
            search=self.settings.search.model_dump_json(),
            number=asked.number,
            retries=self.sweep.retries,
            is_finalist=seed is not None,
            job=Job(
                params_file=str(self.folder / "params.yaml"),
                root=str(self.paths.root),
                task=self.settings.name,
                params=asked.params,
                checkpoint=str(self.folder / f"{name}.safetensors"),
                seed=seed,
                workers=1 if shares else self.sweep.workers,
                heartbeat_s=self.sweep.heartbeat_s,
                shares_forward=shares,
                inputs=self.inputs,
                device=self.device,
            ),
        )

    def run(self, submit: Submit, on_look: OnLook) -> SweepRecord:
        """Train until it is over.

        Args:
            submit: Starts a training on an engine.
            on_look: Called now and then with how it stands.

        Raises:
            PipelineError: No trial ended with a score, or the engine trains nothing.
        """
        self._trials(submit, on_look)
        trials = self.study.trials()[: self.sweep.n_trials]
        complete = [one for one in trials if one.state == "complete"]
        if not complete:
            said = next((one.message for one in reversed(trials) if one.message), "")
            raise PipelineError(
                f"sweep: none of {len(trials)} trials of {self.settings.name} ended with a score"
                + (f"; the last said: {said}" if said else "")
            )
        best = sorted(complete, key=lambda one: (-(one.value or 0.0), one.number))
        best = best[: self.sweep.finalists]
        self._finalists(best, submit, on_look)
        for left in self.folder.glob("*.safetensors"):
            left.unlink()  # of trials that were told, whose process died before it removed it
        return self._record(trials, best)

    def _trials(self, submit: Submit, on_look: OnLook) -> None:
        """Train trials until there are enough, or no further one is worth its time."""

        def following() -> Iterator[tuple[str, Order]]:
            while True:
                self._stopped = self._why_stop()
                # what a dead sweep left is finished all the same
                asked = self.study.ask(0 if self._stopped else self.sweep.n_trials)
                if asked is None:
                    return
                yield f"trial {asked.number}: {in_words(asked.params)}", self.order(asked)

        while True:
            self._train(following(), submit, on_look, lambda: None)
            # a trial that still ran when the sweep was to stop may have brought a gain after all
            if not self._stopped or self._why_stop():
                return

    def _why_stop(self) -> str:
        return self.study.why_stop(self.sweep.patience, self.sweep.margin)

    def _seeds(self) -> range:
        """Return the seeds that a finalist has besides its own."""
        own = self.settings.train.seed
        return range(own + 1, own + self.sweep.seeds)

    def _finalists(self, best: list[TrialRecord], submit: Submit, on_look: OnLook) -> None:
        ended = self.study.seed_scores()
        wanted = {
            (one.number, seed): one.params
            for one in best
            for seed in self._seeds()
            if (one.number, seed) not in ended
        }
        orders = [
            (
                f"finalist {number}, seed {seed}",
                self.order(Asked(number=number, params=params, is_taken_over=False), seed=seed),
            )
            for (number, seed), params in wanted.items()
        ]

        def left() -> int:
            return len(wanted.keys() - self.study.seed_scores().keys())

        self._train(iter(orders), submit, on_look, left)

    def _train(
        self,
        following: Iterator[tuple[str, Order]],
        submit: Submit,
        on_look: OnLook,
        finalists_left: Callable[[], int | None],
    ) -> None:
        """Keep the workers busy with what follows, until nothing does."""
        over: queue.SimpleQueue[str] = queue.SimpleQueue()
        running: dict[str, Order] = {}
        began: dict[str, float] = {}

        def start(name: str, order: Order) -> None:
            running[name] = order
            began.setdefault(name, time.monotonic())
            self.study.take_stop(order.number)  # what stopped an earlier sweep
            submit(name, order, lambda: over.put(name))

        is_last = False
        while True:
            while not is_last and len(running) < self.sweep.workers:
                found = next(following, None)
                if found is None:
                    is_last = True
                    break
                start(*found)
            if not running:
                return
            on_look(self._look(finalists_left()))
            try:
                name = over.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            order = running.pop(name)
            if why := self.study.take_stop(order.number):
                raise PipelineError(f"sweep: {name}: {why}; no finished trial is lost")
            if not self._has_ended(order):
                self._again(name, order, start)
            elif order.is_finalist:
                self._finalists_s.append(time.monotonic() - began[name])
            else:
                self._trials_s[order.number] = time.monotonic() - began[name]

    def _has_ended(self, order: Order) -> bool:
        if order.is_finalist:
            # one that failed leaves its finalist with a seed less
            assert order.job.seed is not None, "a finalist is trained with a seed of its own"
            return self.study.has_seed(order.number, order.job.seed)
        return self.study.release(order.number)

    def _again(self, name: str, order: Order, start: Callable[[str, Order], None]) -> None:
        """Train a trial again whose worker, and not only its process, was lost."""
        if not order.is_finalist and self.study.lost(order.number):
            retries = self.study.retries(order.number)
            if retries > self.sweep.retries:
                ended = Ended(state="crashed", seconds=0.0, retries=retries - 1, message=LOST)
                self.study.tell(order.number, ended)
                return
        else:
            # nobody began to train it: the fault is the engine's
            died = self._resubmitted.get(name, 0) + 1
            self._resubmitted[name] = died
            if died > self.sweep.retries + 1:
                raise PipelineError(
                    f"sweep: {name} was lost by the engine {died} times; no finished trial is "
                    "lost. See the run's log in Prefect, mend the engine, and run the same "
                    "command"
                )
        if not order.is_finalist:
            self.study.hold(order.number)
        start(name, order)

    def _look(self, finalists_left: int | None) -> Look:
        """Return how it stands; without a number of finalists, before their round."""
        ended, running = self.study.trials(), self.study.running()
        trials_left = len(running) if self._stopped else max(0, self.sweep.n_trials - len(ended))
        further = self.sweep.finalists * len(self._seeds())
        if finalists_left is not None:
            trials_left, further = 0, finalists_left
        return Look(
            task=self.settings.name,
            asked=self.sweep.n_trials,
            ended=ended,
            running=running,
            finalists_left=finalists_left or 0,
            seconds_left=seconds_left(
                self._trials_s,
                self._finalists_s,
                complete={one.number for one in ended if one.state == "complete"},
                trials_left=trials_left,
                finalists_left=further,
                workers=self.sweep.workers,
            ),
        )

    def _record(self, trials: tuple[TrialRecord, ...], best: list[TrialRecord]) -> SweepRecord:
        further = self.study.seed_scores()
        finalists = []
        for one in best:
            assert one.value is not None, "a complete trial has a value"
            # a sweep that had more seeds once is decided by as many as the others have
            found = [further.get((one.number, seed)) for seed in self._seeds()]
            scores = (one.value, *(score for score in found if score is not None))
            spread = stdev(scores) if len(scores) > 1 else 0.0
            finalists.append(
                Finalist(number=one.number, scores=scores, mean=fmean(scores), spread=spread)
            )
        # fewer seeds mean less is known: those with all of them come first
        finalists.sort(key=lambda one: (-len(one.scores), -one.rank, one.number))
        return SweepRecord(
            task=self.settings.name,
            metric=Prepared.load(self.paths.prepared).task.metric,
            study=self.study.name,
            space=self.settings.search.space.model_dump(mode="json", exclude_none=True),
            epochs=self.settings.search.epochs,
            asked=self.sweep.n_trials,
            trials=trials,
            finalists=tuple(finalists),
            stopped=self._stopped if len(trials) < self.sweep.n_trials else "",
            seconds=time.monotonic() - self._began,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            flow_run="",
        )


def overlaid(sweep: SweepSettings, changes: Mapping[str, Any]) -> SweepSettings:
    """Return the section with what a caller set; None leaves a key as it is.

    Raises:
        ConfigError: A value is out of its range.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    found: Found = []
    checked = check_section(SweepSettings, {**sweep.model_dump(), **given}, found)
    if found:
        raise ConfigError([(f"sweep.{'.'.join(map(str, where))}", said) for where, said in found])
    assert isinstance(checked, SweepSettings), "problems were raised above"
    return checked


@contextmanager
def opened(settings: Settings, task: str, sweep: SweepSettings) -> Iterator[Sweep]:
    """Open a task's sweep: a new one, or the one that an earlier process left.

    Raises:
        PTv2Error: Settings or data are wrong, the database cannot be used, or another sweep of
            this task is running.
    """
    chosen = settings.task(task)
    if not chosen.search.space.model_dump(exclude_none=True):
        raise ConfigError(
            "search.space: expected a range for one setting at least, such as learning_rate: "
            f"[1.0e-3, 1.0e-1], got none for {task}: all trials would be the same training"
        )
    # neither decides what a trial scores, and so which study it is in
    search = chosen.search.model_copy(update={"parallel": 1, "screen": None})
    chosen = replace(chosen, search=reachable(search, chosen.train))
    paths = TaskPaths(root=settings.root.resolve(), task=task)
    prepared = Prepared.load(paths.prepared)
    backbone = backbone_for(chosen, prepared)
    check_space(chosen, backbone, prepared)
    if sweep.engine == "stack":
        check_shares_forward(chosen.train)
    start = load_start(chosen, prepared, paths, backbone)
    identity = backbone_identity(chosen)
    name = study_name(chosen, prepared, identity, start)
    del backbone  # hosts have their own
    url = read_environment().storage or sweep.storage or f"sqlite:///{paths.sweeps}"
    with (
        _reachable_url(with_driver(url), sweep, paths) as shared,
        _held(SweepStudy(shared, f"{name}-sweep", chosen.search), paths) as study,
    ):
        first = [one.model_dump(exclude_none=True) for one in chosen.search.first]
        study.begin(task, baseline(chosen), first, sweep.transfer)
        made = Sweep(chosen, sweep, paths, study)
        made.inputs = inputs_of(prepared.identity(), identity[0], start.digest if start else None)
        made.device = identity[2]
        begin(study.name)
        made.folder.mkdir(parents=True, exist_ok=True)
        # a sweep goes on with the settings it began with, whatever becomes of the file meanwhile
        shutil.copyfile(settings.path, made.folder / "params.yaml")
        yield made


@contextmanager
def _held(study: SweepStudy, paths: TaskPaths) -> Iterator[SweepStudy]:
    with study.held(paths.sweeps.with_name(f"sweeps-{paths.task}.lock")):
        yield study


@contextmanager
def _reachable_url(url: str, sweep: SweepSettings, paths: TaskPaths) -> Iterator[str]:
    """Yield the URL under which all trials reach the study's database, wherever they train."""
    if sweep.engine in ("processes", "stack") or not url.startswith("sqlite"):
        yield url
        return
    # the address of a work pool is a name, and its workers on other machines need PostgreSQL
    towards, _ = host_and_port(sweep.address or "")
    log = paths.sweeps.with_name(f"proxy-{paths.task}.log")
    with one_writer(url, towards=towards, log=log) as proxied:
        yield proxied
