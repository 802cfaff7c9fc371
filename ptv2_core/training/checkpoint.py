"""Checkpoints of a training: one file, written atomically, that a killed training goes on from."""

import glob
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptv2_core.errors import TrainingError
from ptv2_core.files import write_bytes_atomic

SCHEMA = "1"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that the rest of a training depends on.

    Attributes:
        tensors: Prompt, head, the optimizer's moments, and the best epoch's weights, by name.
        counters: Steps, epochs, losses and scores so far, as JSON holds them.
    """

    tensors: Mapping[str, Tensor]
    counters: Mapping[str, Any]


class Checkpoint:
    """Where a training writes its snapshots, and how often at most."""

    def __init__(
        self, file: Path, *, every_s: float = 30.0, every_steps: int | None = None
    ) -> None:
        """Write `file` when so much time, or so many steps, have passed since the last."""
        self.file = file
        self._every_s = every_s
        self._every_steps = every_steps
        self._saved_at = time.monotonic()
        self._saved_step = 0

    def is_due(self, step: int) -> bool:
        """Tell whether a snapshot after `step` is to be written."""
        if self._every_steps is not None and step - self._saved_step >= self._every_steps:
            return True
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, snapshot: Snapshot, *, fingerprint: str, step: int) -> None:
        """Write a snapshot; a reader sees the old one or the new, never a part.

        Args:
            snapshot: What to write.
            fingerprint: Of all that decides the training; another one's snapshot is not loaded.
            step: After which it was taken.

        Raises:
            TrainingError: It cannot be written.
        """
        counters = json.dumps(dict(snapshot.counters))
        tensors = {name: tensor.detach().cpu() for name, tensor in snapshot.tensors.items()}
        metadata = {
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "counters": counters,
            "digest": _digest(tensors, counters),
        }
        try:
            write_bytes_atomic(self.file, safetensors.torch.save(tensors, metadata))
        except OSError as error:
            raise TrainingError(
                f"{self.file}: the checkpoint could not be written ({error.strerror}); make room "
                "and run again: the training goes on from the last one"
            ) from error
        self._saved_at, self._saved_step = time.monotonic(), step

    def load(self, *, fingerprint: str) -> Snapshot | None:
        """Return the snapshot of this training; None where there is none, or that of another.

        Raises:
            TrainingError: The file is damaged.
        """
        # nobody writes before all have read: what a killed writer left is nobody's
        for left in self.file.parent.glob(f".{glob.escape(self.file.name)}.*"):
            left.unlink(missing_ok=True)
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if (metadata.get("schema"), metadata.get("fingerprint")) != (SCHEMA, fingerprint):
                    return None
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise self._damaged(str(error)) from error
        text, wanted = metadata.get("counters", ""), metadata.get("digest")
        found = _digest(tensors, text)
        if found != wanted:
            raise self._damaged(f"expected a digest of {wanted}, got {found}")
        counters = json.loads(text)
        self._saved_step = counters["step"]
        return Snapshot(tensors=tensors, counters=counters)

    def _damaged(self, how: str) -> TrainingError:
        return TrainingError(
            f"{self.file}: the checkpoint is damaged ({how}); remove it to train from the start"
        )

    def remove(self) -> None:
        """Remove the file: the training is over and its result is safe."""
        self.file.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], counters: str) -> str:
    """Return the hexadecimal sha256 of all that a training goes on from."""
    digest = hashlib.sha256(counters.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
