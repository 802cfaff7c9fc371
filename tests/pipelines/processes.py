"""`ptv2` and what it starts, as real processes: run, watched in /proc, interrupted and killed."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipelines.settings import child_environment

PATIENCE_S = 240.0


def environment(**overrides: str) -> dict[str, str]:
    """Return the environment of a user's shell, without servers of another one."""
    found = child_environment({"OMP_NUM_THREADS": "1", **overrides})
    return {
        name: value
        for name, value in found.items()
        if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    }


def program(name: str = "ptv2") -> str:
    """Return the path of a program that is installed beside this Python."""
    found = shutil.which(name, path=environment()["PATH"])
    assert found is not None, f"{name} is installed"
    return found


def run(root: Path, *command: str, **overrides: str) -> str:
    """Run a command that must succeed; returns its standard output."""
    done = subprocess.run(
        command, cwd=root, env=environment(**overrides), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


def processes(root: Path) -> dict[int, str]:
    """Return the processes, but for this one, that run in a folder or below, with commands."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(root):
                command = (entry / "cmdline").read_bytes()
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def is_running(pid: int) -> bool:
    """Tell whether a process is there and not a zombie.

    While other threads still end, their process looks like one, and holds its locks.
    """
    try:
        os.kill(pid, 0)
        is_zombie = "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
        return not is_zombie or len(os.listdir(f"/proc/{pid}/task")) > 1
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self/status").exists()


def has_mapped(pid: int, part: str) -> bool:
    """Tell whether a process has mapped a file with this in its path."""
    try:
        return part in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


class Running:
    """A command that a test interrupts or kills."""

    def __init__(self, root: Path, *command: str, environment: Mapping[str, str]) -> None:
        """Start it in `root`, in a process group of its own, as a shell does."""
        self._root = root
        self._log = root.with_name(f"{root.name}.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=log, stderr=log, process_group=0
            )

    @property
    def said(self) -> str:
        """What it has written so far, on either stream."""
        return self._log.read_text(encoding="utf-8")

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until something holds; it must do so before the command ends."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill_all()
                raise AssertionError(self.said)
            time.sleep(0.005)

    def wait_until_all_is_gone(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until no process runs in the folder."""
        deadline = time.monotonic() + patience_s
        left = self._left(set())
        while left:
            if time.monotonic() > deadline:
                self.kill_all()
                raise AssertionError(f"{left}\n{self.said}")
            time.sleep(0.02)
            left = self._left(left)

    def _left(self, known: set[int]) -> set[int]:
        """Return the processes in the folder, and those of the known that still end.

        One that is dying leaves its folder before it lets its locks go.
        """
        return {pid for pid in known if is_running(pid)} | set(processes(self._root))

    def kill(self) -> None:
        """Kill the command alone, as the kernel does, and wait for its end."""
        self._process.kill()
        assert self._process.wait() == -signal.SIGKILL, self.said

    def kill_all(self) -> None:
        """Kill all that runs in the folder, the command first."""
        children = set(processes(self._root)) - {self._process.pid}
        self._process.kill()
        self._process.wait()
        left = self._left(children)
        while left:
            for pid in left:
                _kill(pid)
            time.sleep(0.02)
            left = self._left(left)

    def wait(self) -> int:
        """Wait until the command ends by itself; returns its exit code."""
        return self._process.wait(PATIENCE_S)

    def terminate(self) -> int:
        """Ask the command alone to end, as `kill` does; returns its exit code."""
        self._process.terminate()
        return self._process.wait(PATIENCE_S)

    def interrupt(self) -> int:
        """Press Ctrl-C: interrupt the whole group; returns the exit code of the command."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self._process.wait(PATIENCE_S)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
