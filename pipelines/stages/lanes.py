"""Where the trials of a search train: in turn, in processes, or together in one forward."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import TaskSettings
from pipelines.stages.training import (
    backbone_for,
    load_start,
    overlay,
    start_training,
    trunk_cache,
)
from pipelines.study import Lanes, OneByOne
from pipelines.threads import chosen_threads
from ptv2_core.config import TrainConfig
from ptv2_core.errors import PTv2Error, TrainingError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.training.stack import Stack, shares_forward
from ptv2_core.training.start import Start, check_positions
from ptv2_core.training.trunk import TrunkCache


@contextmanager
def open_lanes(
    settings: TaskSettings, paths: TaskPaths, prepared: Prepared, backbone: Backbone
) -> Iterator[Lanes]:
    """Open what suits the device; the trials' scores are the same in all, to rounding in a stack.

    On CUDA the trials share a forward, since small batches leave the card idle. On a CPU they
    share this process's threads out among processes, since two threads on one small product are
    slower than one each.

    Args:
        settings: Of the search.
        paths: Of the task.
        prepared: Its data.
        backbone: Already loaded; processes load it again.
    """
    cache = trunk_cache(settings, paths)
    side_by_side = min(settings.search.parallel, settings.search.n_trials)
    is_alike = shares_forward(settings.train) and settings.train.init_from is None
    if backbone.device.type == "cuda" and is_alike:
        yield Stacked(settings, prepared, backbone, cache)
        return
    threads = chosen_threads()
    processes = min(side_by_side, threads)
    if backbone.device.type == "cpu" and processes > 1:
        workers = Workers(settings, paths, processes=processes, threads=threads // processes)
        try:
            yield workers
        finally:
            workers.close()
        return

    yield one_by_one(settings, paths, prepared, backbone)


def one_by_one(
    settings: TaskSettings, paths: TaskPaths, prepared: Prepared, backbone: Backbone
) -> OneByOne:
    """Return lanes in this process; arguments as for `open_lanes`."""
    start = load_start(settings, prepared, paths, backbone, pulls=False)
    cache = trunk_cache(settings, paths)

    def scores(changes: Mapping[str, Any]) -> Iterator[float]:
        return _scores(settings, prepared, backbone, start, cache, changes)

    return OneByOne(scores)


def trial_config(settings: TaskSettings, changes: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of one trial."""
    return overlay(settings.train, {**changes, "epochs": settings.search.epochs})


def _scores(
    settings: TaskSettings,
    prepared: Prepared,
    backbone: Backbone,
    start: Start | None,
    cache: TrunkCache | None,
    changes: Mapping[str, Any],
) -> Iterator[float]:
    """Train one trial, and yield its score on dev after each epoch."""
    config = trial_config(settings, changes)
    _, reports = start_training(backbone, prepared, config, start=start, trunk=cache)
    for report in reports:
        if report.evaluation is not None:
            yield report.evaluation.score


class Stacked:
    """Lanes that share one forward."""

    def __init__(
        self,
        settings: TaskSettings,
        prepared: Prepared,
        backbone: Backbone,
        cache: TrunkCache | None,
    ) -> None:
        """Hold no trial yet."""
        self._settings = settings
        self._prepared = prepared
        self._stack = Stack(
            backbone,
            task=prepared.task,
            train=prepared.splits["train"],
            dev=prepared.splits["dev"],
            trunk=cache,
        )
        self._waiting: dict[int, deque[float | TrainingError | None]] = {}

    def start(self, lane: int, changes: Mapping[str, Any]) -> None:
        """Begin a trial."""
        config = trial_config(self._settings, changes)
        check_positions(self._stack.model.backbone, config, list(self._prepared.splits.values()))
        self._stack.start(lane, config)
        self._waiting[lane] = deque()

    def next(self, lane: int) -> float | None:
        """Take steps of all trials until this lane's next epoch is over."""
        while not self._waiting[lane]:
            for other, result in self._stack.advance().items():
                if isinstance(result, TrainingError):
                    self._waiting[other].append(result)
                    continue
                if result.evaluation is not None:
                    self._waiting[other].append(result.evaluation.score)
                if other not in self._stack.lanes:
                    self._waiting[other].append(None)
        found = self._waiting[lane].popleft()
        if isinstance(found, TrainingError):
            raise found
        return found

    def stop(self, lane: int) -> None:
        """Give the lane's trial up."""
        if lane in self._stack.lanes:
            self._stack.stop(lane)
        del self._waiting[lane]


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What a process sends in place of a score.

    Attributes:
        message: Why.
        is_trials: Whether it ends the trial alone, not the search.
    """

    message: str
    is_trials: bool


class Workers:
    """Lanes in processes, which share the memory-mapped data and the trunk cache."""

    def __init__(
        self, settings: TaskSettings, paths: TaskPaths, *, processes: int, threads: int
    ) -> None:
        """Start so many processes of so many threads; lanes beyond them share one in turn."""
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, settings, paths, threads), daemon=True
            )
            with deaf_to_interrupts():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._tickets = 0
        self._trials: dict[int, int] = {}  # lane -> ticket: a lane's trials come one after another
        self._waiting: dict[int, deque[float | _Failure | None]] = {}

    def start(self, lane: int, changes: Mapping[str, Any]) -> None:
        """Begin a trial."""
        self._tickets += 1
        self._trials[lane] = self._tickets
        self._waiting[self._tickets] = deque()
        self._send(lane, (self._tickets, dict(changes)))

    def next(self, lane: int) -> float | None:
        """Return the lane's next score; its process may be epochs ahead.

        Raises:
            TrainingError: The trial cannot go on.
            PipelineError: The process cannot, or is gone.
        """
        waiting = self._waiting[self._trials[lane]]
        while not waiting:
            self._receive(lane)
        result = waiting.popleft()
        if isinstance(result, _Failure):
            kind = TrainingError if result.is_trials else PipelineError
            raise kind(result.message)
        return result

    def stop(self, lane: int) -> None:
        """Give the lane's trial up."""
        ticket = self._trials.pop(lane)
        del self._waiting[ticket]
        self._send(lane, (ticket, None))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.join()
            pipe.close()

    def _receive(self, lane: int) -> None:
        """Take the next score that the lane's process sent, of whichever of its trials."""
        try:
            ticket, found = self._pipes[lane % len(self._pipes)].recv()
        except (EOFError, OSError):
            raise self._gone(lane) from None
        # what a trial that was given up still sent is nobody's
        if ticket in self._waiting:
            self._waiting[ticket].append(found)

    def _send(self, lane: int, message: tuple[int, dict[str, Any] | None]) -> None:
        pipe = self._pipes[lane % len(self._pipes)]
        # a process that waits for room for its scores reads nothing
        while pipe.poll():
            self._receive(lane)
        try:
            pipe.send(message)
        except ConnectionError:
            raise self._gone(lane) from None

    def _gone(self, lane: int) -> PipelineError:
        process = self._processes[lane % len(self._pipes)]
        process.join()
        return PipelineError(
            f"search: the process of lane {lane} ended with exit code {process.exitcode} (-9 is "
            "most often too little memory: lower search.parallel or train.token_budget); no "
            "finished trial is lost, and the search goes on when it is run again"
        )


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: the search itself ends its processes.

    They take over which signals are blocked, and so are deaf while they import, too.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, settings: TaskSettings, paths: TaskPaths, threads: int) -> None:
    """Train the trials that come through the pipe, epoch by epoch in turn, until it is closed."""
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        _serve(pipe, settings, paths)
    except (EOFError, ConnectionError):
        return  # the search is over


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "another process started this one"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _serve(pipe: Connection, settings: TaskSettings, paths: TaskPaths) -> None:
    try:
        prepared = Prepared.load(paths.prepared)
        backbone = backbone_for(settings, prepared)
        start = load_start(settings, prepared, paths, backbone, pulls=False)
    except PTv2Error as error:
        while True:  # until the search, which was told why, closes the pipe
            ticket, _ = pipe.recv()
            pipe.send((ticket, _Failure(message=str(error), is_trials=False)))
    cache = trunk_cache(settings, paths)
    running: dict[int, Iterator[float]] = {}
    while True:
        while not running or pipe.poll():
            ticket, changes = pipe.recv()
            if changes is None:
                running.pop(ticket, None)
            else:
                running[ticket] = _scores(settings, prepared, backbone, start, cache, changes)
        for ticket in list(running):
            found = _next(running[ticket])
            if not isinstance(found, float):
                del running[ticket]
            pipe.send((ticket, found))


def _next(scores: Iterator[float]) -> float | _Failure | None:
    try:
        return next(scores, None)
    except PTv2Error as error:
        return _Failure(message=str(error), is_trials=isinstance(error, TrainingError))
