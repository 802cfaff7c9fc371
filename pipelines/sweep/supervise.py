"""One trial, whatever happens to the process that trains it: its end is told once.

The same on every engine: a thread of the sweep, a Ray worker or a Dask worker supervises a host
(`pipelines.sweep.host`) of its own, which it starts again where it dies. In a stack all threads of
a sweep share one (`pipelines.sweep.stack_host`), each with a seat of its own.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import PipelineError
from pipelines.sweep.hosts import CannotGoOnError, Host, Shared, Trains
from pipelines.sweep.job import Job

OnEpoch = Callable[[int, float], bool]
"""Called with an epoch and its score; returns whether the trial is to be given up."""

SIGKILL = -9
START_S = 300.0
"""A host imports and loads before it first speaks; a cold disk takes its time."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a trial ended.

    Attributes:
        state: `complete`, `pruned`, `failed` or `crashed`.
        seconds: Until then.
        retries: How often its host died.
        message: Why it failed or crashed, or what was changed so that it could go on.
    """

    state: Literal["complete", "pruned", "failed", "crashed"]
    seconds: float
    retries: int
    message: str


class Supervisor:
    """Hosts of one process, at most one a thread, kept from trial to trial."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._idle: list[Trains] = []
        self._busy: set[Trains] = set()
        self._shared: Shared | None = None
        self._is_over = False

    def run(
        self,
        job: Job,
        on_epoch: OnEpoch,
        *,
        retries: int,
        on_crash: Callable[[str], None] = lambda why: None,
    ) -> Ended:
        """Train a job to its end.

        Args:
            job: What to train.
            on_epoch: Called once for each epoch, in order.
            retries: How often a host may die.
            on_crash: Called each time one died, with why.

        Raises:
            PipelineError: The sweep is ending.
            CannotGoOnError: Nor can any other trial, as where a disk is full.
        """
        began = time.monotonic()
        died, told, notes = 0, 0, list[str]()
        while True:
            host = self._take(job)
            host.begin(job)
            try:
                state, why, told = self._follow(host, job, on_epoch, told)
            except BaseException:
                self._leave(host)
                raise
            if state in ("complete", "pruned"):
                self._keep(host)
                message = "; ".join(notes)
                return _ended(state, began, died, message)
            if state == "stop":
                self._keep(host)
                raise CannotGoOnError(why)
            if state == "memory" and job.halvings == 0:
                # what is left in a process of its own is not to be trusted; a stack goes on
                self._leave(host)
                job = replace(job, halvings=1)
                notes.append("batches halved, since memory ran out")
                Path(job.checkpoint).unlink(missing_ok=True)
                continue
            if state in ("memory", "failed"):
                (self._leave if state == "memory" else self._keep)(host)
                return _ended("failed", began, died, "; ".join((*notes, why)))
            code = self._drop(host)
            with self._lock:
                if self._is_over:
                    raise PipelineError("the sweep is ending")
            died += 1
            why = why or f"its process ended with exit code {code}"
            on_crash(why)
            if died > retries:
                return _ended("crashed", began, died - 1, "; ".join((*notes, why)))
            if code == SIGKILL and not why.startswith("silent") and job.halvings == 0 and died > 1:
                # killed twice from outside: most often the kernel, for want of memory
                job = replace(job, halvings=1)
                notes.append("batches halved, since its process was killed twice")
                Path(job.checkpoint).unlink(missing_ok=True)

    def _follow(self, host: Trains, job: Job, on_epoch: OnEpoch, told: int) -> tuple[str, str, int]:
        """Return the state that a host's messages end in, why, and the epochs told so far."""
        while True:
            try:
                message = host.receive(job.heartbeat_s if host.has_spoken else START_S)
            except TimeoutError:
                return "died", f"silent for {job.heartbeat_s:g} s", told
            if message is None:
                return "died", "", told
            if "epoch" in message:
                epoch = int(message["epoch"])
                is_over = epoch > told and on_epoch(epoch, float(message["score"]))
                told = max(told, epoch)
                host.say("stop" if is_over else "on")
                if is_over:
                    return "pruned", "", told
            elif "end" in message:
                return "complete", "", told
            elif "failed" in message:
                return "failed", message["failed"], told
            elif "memory" in message:
                return "memory", message["memory"], told
            elif "stop" in message:
                return "stop", message["stop"], told

    def end(self) -> None:
        """Kill all hosts; trials that run raise."""
        with self._lock:
            self._is_over = True
            hosts = [*self._idle, *self._busy]
            self._idle.clear()
        for host in hosts:
            host.kill()

    def _take(self, job: Job) -> Trains:
        with self._lock:
            if self._is_over:
                raise PipelineError("the sweep is ending")
            while self._idle:
                host = self._idle.pop()
                if host.is_alive:
                    self._busy.add(host)
                    return host
                host.kill()
            host = self._seat(job) if job.shares_forward else Host(job)
            self._busy.add(host)
            return host

    def _seat(self, job: Job) -> Trains:
        """Return a seat in the process that all share, which is started again where it died."""
        if self._shared is None or not self._shared.is_alive:
            self._shared = Shared(job)
        return self._shared.seat()

    def _leave(self, host: Trains) -> None:
        with self._lock:
            self._busy.discard(host)
        host.leave()

    def _keep(self, host: Trains) -> None:
        with self._lock:
            self._busy.discard(host)
            self._idle.append(host)

    def _drop(self, host: Trains) -> int:
        with self._lock:
            self._busy.discard(host)
        return host.kill()


def _ended(state: Any, began: float, retries: int, message: str) -> Ended:
    return Ended(state=state, seconds=time.monotonic() - began, retries=retries, message=message)
