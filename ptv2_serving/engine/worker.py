"""One process that computes, and whose rows it computes, as the pool knows them."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from ptv2_serving.engine.process import Host
from ptv2_serving.engine.waiting import Item


class Owner(Protocol):
    """Whose rows the processes compute."""

    def folders(self) -> Mapping[int, Path]:
        """Return the folder of each resident prompt, by slot."""
        ...

    def on_free(self) -> None:
        """A process has room for a batch."""
        ...

    def on_logits(self, items: Sequence[Item], logits: Sequence[Any]) -> None:
        """A batch was computed; None stands for a row whose prompt that process does not hold."""
        ...

    def on_failed(self, items: Sequence[Item], problem: str) -> None:
        """A batch was not computed."""
        ...


@dataclass(kw_only=True, eq=False)
class Worker:
    """One process that computes.

    Attributes:
        connection: To it.
        host: Itself, where it loaded the backbone and is not forked.
        card: The number of its GPU; None: it is on the CPU.
        pid: Its number, once it has said it.
        is_ready: Whether it holds all prompts, and may compute.
        batches: What it was given and has not answered, by number.
        calls: What else it was asked and has not answered, by number.
    """

    connection: Connection
    host: Host | None = None
    card: int | None = None
    pid: int | None = None
    is_ready: bool = False
    batches: dict[int, list[Item]] = field(default_factory=dict)
    calls: dict[int, "asyncio.Future[Any]"] = field(default_factory=dict)
