"""Child processes that never outlive this one, not even when it is killed with SIGKILL.

Between the parent and the command stands this file, run as a script. It starts the command in a
session of its own and waits for the end of its standard input: the other end of that pipe is held
by the parent alone, and the kernel closes it however the parent dies. Then it ends the command's
whole process group. Unlike PR_SET_PDEATHSIG this works on every POSIX system, reaches
grandchildren, and does not depend on which thread of the parent started the child.

The script imports the standard library only, so that it starts in some 20 ms.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

GRACE_S = 10.0


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    output: IO[str] | None = None,
) -> subprocess.Popen[str]:
    """Start a command that ends when this process ends.

    Args:
        command: The program and its arguments.
        cwd: The folder it runs in.
        environment: Its whole environment.
        output: The open file it writes to; none gives two pipes, which must be read.
    """
    sink = subprocess.PIPE if output is None else output
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *command],
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=sink,
        stderr=sink,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def stop(process: subprocess.Popen[str]) -> None:
    """Tell a started command to end: an interrupt first, then firmer; `wait` for it afterwards."""
    if process.stdin is not None and not process.stdin.closed:
        process.stdin.close()


def main(command: list[str]) -> int:
    """Run a command until it ends or standard input does; return its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    ending = threading.Thread(target=_end_with_stdin, args=(child.pid,), daemon=True)

    def on_terminate(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=_end_group, args=(child.pid,), daemon=True).start()

    # A handler, not SIG_IGN, which the command would inherit. On Ctrl-C the parent decides.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, on_terminate)
    ending.start()
    status = child.wait()
    _signal_group(child.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _end_with_stdin(group: int) -> None:
    os.read(0, 1)
    _end_group(group)


def _end_group(group: int) -> None:
    """Interrupt, terminate, then kill all processes of a group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        deadline = time.monotonic() + GRACE_S
        if not _signal_group(group, number):
            return
        while time.monotonic() < deadline:
            if not _signal_group(group, 0):
                return
            time.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal (0: none) to a group; False where it has no process left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
