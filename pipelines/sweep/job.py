"""What is trained, as it goes to a process that trains; it imports nothing that is slow to load."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of a trial, as it goes through the pipe.

    Attributes:
        params_file: The settings as they were when the sweep began.
        root: The workspace.
        task: The task.
        params: What was drawn, by the names of `search.space`.
        seed: In place of that of `train`; None keeps it.
        checkpoint: Where the training goes on from, and keeps its state.
        halvings: How often batches were halved for want of memory.
        workers: How many trials run side by side on this machine.
        heartbeat_s: Silence after which the host is taken for dead.
        shares_forward: Whether it trains in a stack, with what else trains on this machine.
    """

    params_file: str
    root: str
    task: str
    params: dict[str, Any]
    checkpoint: str
    seed: int | None = None
    halvings: int = 0
    workers: int = 1
    heartbeat_s: float = 60.0
    shares_forward: bool = False

    def dumps(self) -> str:
        """Return the job as a line."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, line: str) -> "Job":
        """Return the job of a line."""
        return cls(**json.loads(line))
