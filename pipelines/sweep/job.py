"""What is trained, as it goes to a process that trains; it imports nothing that is slow to load."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
        inputs: What the study's scores depend on, as `inputs_of` gives it; empty: anything.
        device: The kind of device that trains it, as far as the sweep can tell.
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
    inputs: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def dumps(self) -> str:
        """Return the job as a line."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, line: str) -> "Job":
        """Return the job of a line."""
        return cls(**json.loads(line))


def inputs_of(data: Mapping[str, Any], backbone: str, start: str | None) -> dict[str, str]:
    """Return what all trials of a study must find, by the setting or the folder that it is of.

    Args:
        data: As `Prepared.identity` gives it.
        backbone: The digest of its weights.
        start: The digest of the prompt that trainings begin from.
    """
    text = json.dumps(data, sort_keys=True)
    return {
        "data/prepared": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        "backbone": backbone,
        "train.init_from": start or "none",
    }
