"""A process whose trials share one forward: `python -m pipelines.sweep.stack_host`.

Like `pipelines.sweep.host`, but for many trials at once: each line, of either side, says whose it
is. A trial whose epoch is over waits for its word while the others go on; one that comes is begun
between two steps.
"""

import json
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.sweep.host import Pipe, Trainer, problem_of, trainer_for
from pipelines.sweep.job import Job
from ptv2_core.errors import TrainingError
from ptv2_core.training.records import EpochRecord, TrainReport
from ptv2_core.training.stack import Stack


@dataclass(kw_only=True)
class _Trial:
    """A trial in a lane.

    Attributes:
        lane: Of the stack.
        history: Its epochs so far.
        told: How many of them were told.
        waits: Whether it waits for the word to go on.
    """

    lane: int
    history: list[EpochRecord] = field(default_factory=list)
    told: int = 0
    waits: bool = False


class Crew:
    """The trials that train, by the names that the other side gave them."""

    def __init__(self, trainer: Trainer, pipe: Pipe) -> None:
        """Hold no trial yet."""
        self._trainer = trainer
        self._pipe = pipe
        self._stack: Stack = trainer.stack()
        self._trials: dict[str, _Trial] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do before the other side says something."""
        return all(trial.waits for trial in self._trials.values())

    def hear(self, name: str, order: dict[str, Any]) -> None:
        """Do what the other side says of a trial."""
        if "job" in order:
            self._begin(name, Job(**order["job"]))
        elif name not in self._trials:
            return  # it ended while the word was on its way
        elif order["say"] == "on":
            self._trials[name].waits = False
            self._tell(name)
        else:
            self._leave(name)

    def advance(self) -> None:
        """Take a step of every trial that does not wait."""
        by_lane = {one.lane: name for name, one in self._trials.items() if not one.waits}
        for lane, result in self._stack.advance(by_lane).items():
            name = by_lane[lane]
            if isinstance(result, TrainingError):
                self._fail(name, result)
            else:
                self._note(name, result)

    def fail_all(self, error: Exception) -> None:
        """Say of every trial that it cannot go on, and leave the stack that it was in."""
        for name in list(self._trials):
            self._pipe.send({"trial": name, **problem_of(error)})
        self._trials.clear()
        self._stack = self._trainer.stack()

    def _begin(self, name: str, job: Job) -> None:
        taken = {trial.lane for trial in self._trials.values()}
        lane = next(lane for lane in range(len(taken) + 1) if lane not in taken)
        try:
            resumed = self._trainer.begin(self._stack, lane, job)
        except Exception as error:
            # whatever it is, it ends this trial and not the others
            self._pipe.send({"trial": name, **problem_of(error)})
            return
        self._trials[name] = _Trial(lane=lane)
        if resumed is not None:
            self._note(name, resumed)

    def _note(self, name: str, report: TrainReport) -> None:
        trial = self._trials[name]
        if len(report.history) > trial.told or trial.lane not in self._stack.lanes:
            trial.history = list(report.history)
            self._tell(name)

    def _tell(self, name: str) -> None:
        """Tell an epoch that was not, or the end."""
        trial = self._trials[name]
        if trial.told < len(trial.history):
            record = trial.history[trial.told]
            trial.told += 1
            trial.waits = True
            self._pipe.send({"trial": name, "epoch": record.epoch, "score": record.dev_score})
        elif trial.lane not in self._stack.lanes:
            del self._trials[name]
            self._pipe.send({"trial": name, "end": True})

    def _fail(self, name: str, error: TrainingError) -> None:
        del self._trials[name]
        self._pipe.send({"trial": name, **problem_of(error)})

    def _leave(self, name: str) -> None:
        trial = self._trials.pop(name)
        if trial.lane in self._stack.lanes:
            self._stack.stop(trial.lane)


class _Orders:
    """Lines from the other side, which a thread reads while trials train."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        self._lines.put("")

    def next(self) -> dict[str, Any] | None:
        """Wait for a line; None: there are no more."""
        return self._parse(self._lines.get())

    def waiting(self) -> Iterator[dict[str, Any] | None]:
        """Yield those that came meanwhile."""
        while not self._lines.empty():
            yield self._parse(self._lines.get())

    @staticmethod
    def _parse(line: str) -> dict[str, Any] | None:
        return json.loads(line) if line else None


def main() -> None:
    """Serve until standard input ends."""
    pipe, orders = Pipe(), _Orders()
    try:
        _serve(pipe, orders)
    except BrokenPipeError:
        return


def _serve(pipe: Pipe, orders: _Orders) -> None:
    crew: Crew | None = None
    beating = False
    while True:
        came = [orders.next()] if crew is None or crew.is_idle else list(orders.waiting())
        for order in came:
            if order is None:
                return
            name = order.pop("trial")
            if crew is None:
                job = Job(**order["job"])
                beating = beating or bool(pipe.beat(job))
                crew = _open(name, job, pipe)
            if crew is not None:
                crew.hear(name, order)
        if crew is None or crew.is_idle:
            continue
        try:
            crew.advance()
        except BrokenPipeError:
            raise
        except Exception as error:
            # it cannot be said whose fault it is
            crew.fail_all(error)


def _open(name: str, job: Job, pipe: Pipe) -> Crew | None:
    """Load what all trials share; None, and the trial has failed, where that cannot be."""
    try:
        return Crew(trainer_for(job), pipe)
    except Exception as error:
        pipe.send({"trial": name, **problem_of(error)})
        return None


if __name__ == "__main__":
    main()
