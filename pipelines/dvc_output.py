"""What `dvc repro` writes: DVC's lines told from the command's, and its failures told apart.

DVC gives 255 for whatever goes wrong; what it was is in its words, which a test pins.
"""

import queue
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Literal

from pipelines import guarded
from pipelines.errors import EXIT_TEMPORARY, StageFailedError, StageTemporaryError

Stream = Literal["stdout", "stderr"]
OnLine = Callable[[Stream, str], None]

TAIL_LINES = 20
POLL_S = 0.1
KILLED_CODES = (-9, 137)
LAST_WORDS = ("Updating lock file", "Generating lock file", "Use `dvc push`")
LOCK_WORDS = ("Unable to acquire lock", "is busy, it is being blocked by")


@dataclass(kw_only=True)
class Output:
    """What the output of one `dvc repro` says: DVC's lines noted, the command's lines handed on.

    Attributes:
        started: Whether the stage's command was started.
        cached: Whether the outs of an earlier run were taken instead.
        exit_code: What a command that failed exited with.
        dvc_words: DVC's errors.
        tail: The last lines that the command wrote as errors.
    """

    started: bool = False
    cached: bool = False
    exit_code: int | None = None
    dvc_words: list[str] = field(default_factory=list)
    tail: deque[str] = field(default_factory=partial(deque, maxlen=TAIL_LINES))
    _in_command: bool = False

    def note(self, stream: Stream, line: str) -> bool:
        """Take in one line; tell whether it is the command's own."""
        return self._note_stdout(line) if stream == "stdout" else self._note_stderr(line)

    def _note_stdout(self, line: str) -> bool:
        if line.startswith("Stage '") and " is cached - " in line:
            self.cached = True
        elif line.startswith("Running stage '"):
            self.started = True
        elif self.started and not self._in_command and line.startswith("> "):
            self._in_command = True
        elif line.startswith(LAST_WORDS):
            self._in_command = False
        else:
            return self._in_command
        return False

    def _note_stderr(self, line: str) -> bool:
        if line.startswith("ERROR: "):
            match = re.search(r"exited with (-?\d+)$", line)
            self.exit_code = int(match[1]) if match else self.exit_code
            self.dvc_words.append(line.removeprefix("ERROR: "))
            return False
        if not line.strip() or line.startswith("WARNING: "):
            return False
        self.tail.append(line)
        return True


def follow(
    process: "subprocess.Popen[str]", output: Output, on_line: OnLine, stop: threading.Event
) -> bool:
    """Work through the output until the process ends; tell whether `stop` ended it."""
    lines: queue.SimpleQueue[tuple[Stream, str] | None] = queue.SimpleQueue()

    def read(stream: Stream, pipe: IO[str]) -> None:
        with pipe:
            for raw in pipe:
                # A progress bar writes over its line; what it wrote last is what counts.
                lines.put((stream, raw.rstrip("\r\n").rpartition("\r")[2]))
        lines.put(None)

    streams: list[tuple[Stream, IO[str] | None]] = [
        ("stdout", process.stdout),
        ("stderr", process.stderr),
    ]
    for pair in streams:
        threading.Thread(target=read, args=pair, daemon=True).start()
    num_open = len(streams)
    interrupted = False
    try:
        while num_open:
            if stop.is_set() and not interrupted:
                interrupted = True
                guarded.stop(process)
            with suppress(queue.Empty):
                item = lines.get(timeout=POLL_S)
                if item is None:
                    num_open -= 1
                elif output.note(*item):
                    on_line(*item)
    finally:
        # On any way out, an exception from `on_line` included, the child ends first.
        guarded.stop(process)
        process.wait()
    return interrupted


def failure(address: str, output: Output) -> StageFailedError:
    """Classify a failure: by the command's exit code, or else by DVC's own words."""
    code = output.exit_code
    if code is None:
        words = "\n".join([*output.dvc_words, *output.tail]) or "DVC ended without a word"
        if any(part in words for part in LOCK_WORDS):
            return StageTemporaryError(address, f"another process is in the way: {words}")
        return StageFailedError(address, words)
    message = "\n".join(output.tail) or f"its command exited with {code}, silently"
    if code in KILLED_CODES:
        message += "\nIt was killed (SIGKILL); the machine may be out of memory"
    kind = StageTemporaryError if code == EXIT_TEMPORARY else StageFailedError
    return kind(address, message, code)
