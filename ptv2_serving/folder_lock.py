"""A lock on a folder that leaves no file behind and is given up on in time."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptv2_serving.tracking import StoreError

POLL_S = 0.02


@contextmanager
def held(folder: Path | None, *, wait_s: float) -> Iterator[None]:
    """Hold the lock of a folder; the operating system lets go when the process dies.

    A database itself must not be opened for this: closing it would drop SQLite's own locks.

    Args:
        folder: Which; None: there is nothing to lock.
        wait_s: How long to wait for another holder.

    Raises:
        StoreError: Another process holds it for longer.
    """
    if folder is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + wait_s
        while not _taken(descriptor):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{folder} has been locked by another process for {wait_s:g} seconds; try again"
                )
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
