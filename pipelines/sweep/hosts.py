"""Processes that train trials, as whoever started them sees them."""

import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from typing import Any, Protocol

from pipelines.errors import PipelineError
from pipelines.settings import child_environment
from pipelines.sweep.job import Job
from pipelines.threads import thread_environment


class CannotGoOnError(PipelineError):
    """No trial can go on, and none is at fault: a disk is full, or what all share is not there."""


class Trains(Protocol):
    """What trains one trial at a time: a process, or a seat in one."""

    @property
    def has_spoken(self) -> bool:
        """Whether the process ever said something."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        ...

    @property
    def pid(self) -> int:
        """The process."""
        ...

    def begin(self, job: Job) -> None:
        """Have a job trained."""
        ...

    def say(self, word: str) -> None:
        """Answer an epoch: `on` or `stop`."""
        ...

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; None where the process is gone.

        Raises:
            TimeoutError: It is silent for so long.
        """
        ...

    def leave(self) -> None:
        """Give up what it trains, of which no more is heard."""
        ...

    def kill(self) -> int:
        """End the process, stopped or not; returns its exit code."""
        ...


def _start(module: str, job: Job) -> subprocess.Popen[str]:
    """Start a process that reads lines and writes lines.

    Raises:
        CannotGoOnError: This machine does not see the workspace, or has no room for a process.
    """
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=job.root,
            env=child_environment(defaults=thread_environment(job.workers)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the sweep, which ends its hosts
            start_new_session=True,
        )
    except OSError as error:
        raise CannotGoOnError(
            f"{job.root}: expected the workspace of the sweep, in which {socket.gethostname()} can "
            f"start a process, got: {error}; have it at the same path on all machines, on a disk "
            "that they share"
        ) from error


def _end(process: subprocess.Popen[str]) -> int:
    """End a process, stopped or not; returns its exit code."""
    process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:
            continue  # what was left to write to it is lost with it
    return code


def _write(process: subprocess.Popen[str], line: str) -> None:
    """Write a line; a process that is gone is noticed by who reads."""
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except (OSError, ValueError):
        return  # ValueError: it was ended, and its pipe closed


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the lines of a process, whole ones only."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.endswith("\n"):
                yield line
    except ValueError:
        return  # closed while reading


class _Heard:
    """Messages as they come, from a thread that reads."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def put(self, message: dict[str, Any] | None) -> None:
        self._messages.put(message)

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None


class Host:
    """A process that trains one trial at a time."""

    def __init__(self, job: Job) -> None:
        """Start it for such jobs."""
        self._process = _start("pipelines.sweep.host", job)
        self._heard = _Heard()
        self._has_spoken = False
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def has_spoken(self) -> bool:
        """Whether it ever said something."""
        return self._has_spoken

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def begin(self, job: Job) -> None:
        """Have a job trained."""
        _write(self._process, job.dumps())

    def say(self, word: str) -> None:
        """Answer an epoch: `on` or `stop`."""
        _write(self._process, word)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; None where the process is gone.

        Raises:
            TimeoutError: It is silent for so long.
        """
        message = self._heard.next(timeout_s)
        self._has_spoken = self._has_spoken or message is not None
        return message

    def leave(self) -> None:
        """Give up what it trains."""
        self.kill()

    def kill(self) -> int:
        """End it, stopped or not; returns its exit code."""
        return _end(self._process)

    def _read(self) -> None:
        for line in _lines(self._process):
            self._heard.put(json.loads(line))
        self._heard.put(None)


class Shared:
    """A process that trains many trials at once, each in a seat of its own."""

    def __init__(self, job: Job) -> None:
        """Start it for such jobs."""
        self.process = _start("pipelines.sweep.stack_host", job)
        self.has_spoken = False
        self._lock = threading.Lock()
        self._names = count()
        self._heard: dict[str, _Heard] = {}
        self._is_over = False
        self._code: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def seat(self) -> "Seat":
        """Return a seat that nobody has."""
        return Seat(self)

    def join(self, job: Job) -> tuple[str, _Heard]:
        """Have a job trained; returns its name, and where it is heard."""
        heard = _Heard()
        with self._lock:
            name = str(next(self._names))
            self._heard[name] = heard
            if self._is_over:
                heard.put(None)
            _write(self.process, json.dumps({"trial": name, "job": asdict(job)}))
        return name, heard

    def say(self, name: str, word: str) -> None:
        """Answer a trial's epoch."""
        with self._lock:
            _write(self.process, json.dumps({"trial": name, "say": word}))

    def forget(self, name: str) -> None:
        """Hear no more of a trial."""
        with self._lock:
            self._heard.pop(name, None)

    def kill(self) -> int:
        """End it; returns its exit code, 0 where it ran until then.

        So the trials beside the one that asks for it are not taken for killed from outside.
        """
        with self._lock:
            if self._code is None:
                died = self.process.poll()
                _end(self.process)
                self._code = 0 if died is None else died
            return self._code

    def _read(self) -> None:
        for line in _lines(self.process):
            message = json.loads(line)
            self.has_spoken = True
            name = message.pop("trial", None)
            with self._lock:
                # without a name: that the process is alive
                to = list(self._heard.values()) if name is None else [self._heard.get(name)]
            for heard in to:
                if heard is not None:
                    heard.put(message)
        with self._lock:
            self._is_over = True
            for heard in self._heard.values():
                heard.put(None)


class Seat:
    """A place for one trial at a time in a process that is shared."""

    def __init__(self, shared: Shared) -> None:
        """Hold no trial yet."""
        self._shared = shared
        self._name = ""
        self._heard = _Heard()

    @property
    def has_spoken(self) -> bool:
        """Whether the process ever said something."""
        return self._shared.has_spoken

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._shared.is_alive

    @property
    def pid(self) -> int:
        """The process."""
        return self._shared.process.pid

    def begin(self, job: Job) -> None:
        """Have a job trained."""
        self._shared.forget(self._name)
        self._name, self._heard = self._shared.join(job)

    def say(self, word: str) -> None:
        """Answer an epoch: `on` or `stop`."""
        self._shared.say(self._name, word)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; None where the process is gone.

        Raises:
            TimeoutError: It is silent for so long.
        """
        return self._heard.next(timeout_s)

    def leave(self) -> None:
        """Give up what it trains, and let the others go on."""
        self._shared.say(self._name, "stop")
        self._shared.forget(self._name)

    def kill(self) -> int:
        """End the process, and with it the trials of the other seats."""
        return self._shared.kill()
