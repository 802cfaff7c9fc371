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

import torch

from pipelines.paths import TaskPaths
from pipelines.schema import nested
from pipelines.settings import TaskSettings, load_settings
from pipelines.stages.lanes import trial_config
from pipelines.stages.prepare import Prepared
from pipelines.stages.training import backbone_for, load_start, start_training, trunk_cache
from pipelines.sweep.job import Job
from pipelines.threads import limit_threads
from ptv2_core.config import TrainConfig
from ptv2_core.errors import PTv2Error
from ptv2_core.training.checkpoint import Checkpoint

BEATS_PER_TIMEOUT = 4
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
        checkpoint = Checkpoint(
            Path(job.checkpoint), every_s=min(self._settings.run.checkpoint_s, job.heartbeat_s)
        )
        _, reports = start_training(
            self._backbone,
            self._prepared,
            self.config(job),
            start=self._start,
            trunk=self._cache,
            checkpoint=checkpoint,
        )
        told = 0
        for report in reports:
            for record in report.history[told:]:
                told += 1
                yield record.epoch, record.dev_score


def is_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("alloc" in words or "out of memory" in words)
    )


def is_room(error: BaseException | None) -> bool:
    """Tell whether an exception says that a disk is full, or comes of one that does."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__
    return False


class _Pipe:
    """Lines to whoever started this process, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()


def _beat(pipe: _Pipe, every_s: float, stop: threading.Event) -> None:
    while not stop.wait(every_s):
        try:
            pipe.send({"beat": True})
        except OSError:
            os._exit(1)  # nobody listens, and the main thread may train for long yet


def _serve(job: Job, trainers: dict[tuple[str, str], Trainer], pipe: _Pipe, orders: TextIO) -> None:
    """Train one job; after each epoch the other side says whether to go on."""
    key = (job.params_file, job.task)
    if key not in trainers:
        trainers.clear()
        limit_threads(job.workers)
        settings = load_settings(Path(job.params_file)).task(job.task)
        trainers[key] = Trainer(settings, Path(job.root))
    for epoch, score in trainers[key].train(job):
        pipe.send({"epoch": epoch, "score": score})
        if orders.readline().strip() != "on":
            return
    pipe.send({"end": True})


def main() -> None:
    """Serve until standard input ends."""
    orders = sys.stdin
    # what libraries print would be read as messages
    pipe = _Pipe(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    trainers: dict[tuple[str, str], Trainer] = {}
    while line := orders.readline():
        job = Job(**json.loads(line))
        stop = threading.Event()
        every_s = job.heartbeat_s / BEATS_PER_TIMEOUT
        threading.Thread(target=_beat, args=(pipe, every_s, stop), daemon=True).start()
        try:
            _serve(job, trainers, pipe, orders)
        except BrokenPipeError:
            return
        except Exception as error:
            # whatever it is, it ends this trial and not the sweep; a full disk is no fault of its
            kind = "room" if is_room(error) else "memory" if is_memory(error) else "failed"
            is_ours = isinstance(error, PTv2Error)
            pipe.send({kind: str(error) if is_ours else f"{type(error).__name__}: {error}"})
        finally:
            stop.set()


if __name__ == "__main__":
    main()
