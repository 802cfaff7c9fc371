"""One file per stage of dvc.yaml, with its name: paths and settings in, dataclasses out."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], Any]
"""Called with what is going on, how much is done, and out of how much."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
