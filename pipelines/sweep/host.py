"""A process that trains trials for others: `python -m pipelines.sweep.host`, lines of JSON.

It keeps data and backbone between trials, which costs a start once and not for each. What it is
told comes through standard input, what it finds goes out through standard output, and the end of
its input ends it: a host never outlives the process that started it. A thread of its own says that
it is alive, so that one that is stopped or stuck is known from one that is slow.
"""

import errno
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.schema import nested
from pipelines.settings import TaskSettings, load_settings
from pipelines.stages.lanes import trial_config
from pipelines.stages.training import backbone_for, load_start, start_training, trunk_cache
from pipelines.sweep.job import Job, inputs_of
from pipelines.threads import set_up_torch
from ptv2_core.config import TrainConfig
from ptv2_core.errors import PTv2Error
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.records import TrainReport
from ptv2_core.training.stack import Stack
from ptv2_core.training.start import check_positions
from ptv2_core.training.stepping import is_memory

BEATS_PER_TIMEOUT = 4
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class InputsError(PipelineError):
    """What all trials share cannot be loaded, or has changed: no trial is at fault."""


class Trainer:
    """Trains jobs of one task; what they share is loaded once."""

    def __init__(self, settings: TaskSettings, root: Path) -> None:
        """Load data and backbone.

        Raises:
            PTv2Error: They are not there, or not what they should be.
        """
        self._settings = settings
        self._paths = TaskPaths(root=root, task=settings.name)
        self._prepared = Prepared.load(self._paths.prepared)
        self._backbone = backbone_for(settings, self._prepared)
        self._start = load_start(settings, self._prepared, self._paths, self._backbone, pulls=False)
        self._cache = trunk_cache(settings, self._paths)

    @property
    def inputs(self) -> dict[str, str]:
        """What was loaded, as a job names it."""
        start = None if self._start is None else self._start.digest
        return inputs_of(self._prepared.identity(), self._backbone.spec.digest, start)

    def config(self, job: Job) -> TrainConfig:
        """Return the settings of a job."""
        changes: dict[str, Any] = nested(job.params)
        if job.seed is not None:
            changes["seed"] = job.seed
        config = trial_config(self._settings, changes)
        for _ in range(job.halvings):
            smaller = {
                "batch_size": max(1, config.batch_size // 2),
                "token_budget": max(16, config.token_budget // 2),
            }
            config = TrainConfig.from_mapping({**config.to_mapping(), **smaller})
        return config

    def train(self, job: Job) -> Iterator[tuple[int, float]]:
        """Yield each epoch and its score on dev, those before a checkpoint too.

        Raises:
            PTv2Error: The training cannot go on.
        """
        _, reports = start_training(
            self._backbone,
            self._prepared,
            self.config(job),
            start=self._start,
            trunk=self._cache,
            checkpoint=self._checkpoint(job),
        )
        told = 0
        for report in reports:
            for record in report.history[told:]:
                told += 1
                yield record.epoch, record.dev_score

    def stack(self) -> Stack:
        """Return a stack for trials of the task."""
        splits = self._prepared.splits
        return Stack(
            self._backbone,
            task=self._prepared.task,
            train=splits["train"],
            dev=splits["dev"],
            trunk=self._cache,
        )

    def begin(self, stack: Stack, lane: int, job: Job) -> TrainReport | None:
        """Begin a job in a lane of such a stack; returns and raises as `Stack.start`."""
        config = self.config(job)
        check_positions(self._backbone, config, list(self._prepared.splits.values()))
        return stack.start(lane, config, start=self._start, checkpoint=self._checkpoint(job))

    def _checkpoint(self, job: Job) -> Checkpoint:
        every_s = min(self._settings.run.checkpoint_s, job.heartbeat_s)
        return Checkpoint(Path(job.checkpoint), every_s=every_s)


def is_room(error: BaseException | None) -> bool:
    """Tell whether an exception says that a disk is full, or comes of one that does."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__
    return False


class Pipe:
    """Lines to whoever started this process, from any thread."""

    def __init__(self) -> None:
        """Take standard output away from libraries, whose words would be read as messages."""
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.Lock()
        os.dup2(2, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a line."""
        with self._lock:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()

    def beat(self, job: Job) -> threading.Event:
        """Say from now on that this process is alive, until what is returned is set."""
        stop = threading.Event()
        every_s = job.heartbeat_s / BEATS_PER_TIMEOUT
        threading.Thread(target=self._beat, args=(every_s, stop), daemon=True).start()
        return stop

    def _beat(self, every_s: float, stop: threading.Event) -> None:
        while not stop.wait(every_s):
            try:
                self.send({"beat": True})
            except OSError:
                os._exit(1)  # nobody listens, and the main thread may train for long yet


def problem_of(error: Exception) -> dict[str, str]:
    """Return the message that says what ended a trial, or keeps it and all others from going on."""
    is_nobodys = is_room(error) or isinstance(error, InputsError)
    kind = "stop" if is_nobodys else "memory" if is_memory(error) else "failed"
    return {kind: _words(error)}


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, PTv2Error) else f"{type(error).__name__}: {error}"


def trainer_for(job: Job) -> Trainer:
    """Return what trains a job.

    Raises:
        InputsError: Data or backbone cannot be loaded, or are not those that the study began with.
    """
    set_up_torch(job.workers)
    try:
        settings = load_settings(Path(job.params_file)).task(job.task)
        trainer = Trainer(settings, Path(job.root))
    except Exception as error:
        # whatever it is, the next trial would meet it too
        raise InputsError(
            f"what trials train on cannot be loaded: {_words(error)}; once that is mended, the "
            "same command goes on, or begins a new study where the data is another"
        ) from error
    found = trainer.inputs
    for name, wanted in job.inputs.items():
        if found[name] != wanted:
            raise InputsError(
                f"{name} of {job.task}: expected {wanted}, with which the study began, got "
                f"{found[name]}; it changed meanwhile: the same command begins a new study"
            )
    return trainer


def _serve(job: Job, trainers: dict[tuple[str, str], Trainer], pipe: Pipe, orders: TextIO) -> None:
    """Train one job; after each epoch the other side says whether to go on."""
    key = (job.params_file, job.task)
    if key not in trainers:
        trainers.clear()
        trainers[key] = trainer_for(job)
    for epoch, score in trainers[key].train(job):
        pipe.send({"epoch": epoch, "score": score})
        if orders.readline().strip() != "on":
            return
    pipe.send({"end": True})


def main() -> None:
    """Serve until standard input ends."""
    orders, pipe = sys.stdin, Pipe()
    trainers: dict[tuple[str, str], Trainer] = {}
    while line := orders.readline():
        job = Job.loads(line)
        stop = pipe.beat(job)
        try:
            _serve(job, trainers, pipe, orders)
        except BrokenPipeError:
            return
        except Exception as error:
            # whatever it is, it ends this trial and not the sweep
            pipe.send(problem_of(error))
        finally:
            stop.set()


if __name__ == "__main__":
    main()
