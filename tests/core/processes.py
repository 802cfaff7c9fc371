"""Processes that tests start and kill: forked from a server that has torch loaded already."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

# threads that wait for each other sleep: on a machine with as many busy processes as cores, those
# that spin take the core from the one they wait for
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONTEXT = multiprocessing.get_context("forkserver")
# loaded once: a process that is started, killed and started again would spend its time on imports
CONTEXT.set_forkserver_preload(["torch", "transformers", "tests.core.workers"])

# in which any step of a tiny training is over: a process that says nothing for longer hangs
TIMEOUT_S = 120.0


class Child:
    """A process that does some work and says through a pipe how far it is."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        """Start `work(connection, *args)`; it must be a module's own function."""
        self._connection, far = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=work, args=(far, *args), daemon=True)
        self._process.start()
        far.close()

    def receive(self) -> Any:
        """Return what the process says next.

        Raises:
            EOFError: It has ended without saying more.
            AssertionError: It hangs; it was killed.
        """
        if not self._connection.poll(TIMEOUT_S):
            self.kill()
            raise AssertionError(f"the process said nothing for {TIMEOUT_S:g} s")
        return self._connection.recv()

    def go_on(self) -> None:
        """Let a process go on that waits for a word."""
        self._connection.send(None)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.join()

    def join(self) -> int:
        """Wait until the process is gone; returns its exit code, negative if killed.

        Raises:
            AssertionError: It hangs; it was killed.
        """
        self._process.join(TIMEOUT_S)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"the process did not end within {TIMEOUT_S:g} s")
        return self._process.exitcode
