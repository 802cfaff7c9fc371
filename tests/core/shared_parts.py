"""Two tasks that share a prompt, and a process that trains them."""

from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch

from ptv2_core.artifact import Weights
from ptv2_core.config import TrainConfig
from ptv2_core.files import write_bytes_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit_together
from ptv2_core.training.records import TrainReport
from ptv2_core.training.sources import Source
from ptv2_core.training.start import new_slot
from tests.core.kind_parts import kind_examples, kind_task
from tests.tiny import encode_for, examples_of, open_backbone, task_of

SIZES = (40, 24)


class SharedBench:
    """A tiny backbone with two classification tasks: three labels of many rows, two of few.

    Attributes:
        backbone: Loaded once; it is frozen.
        sources: One a task, in slots 0 and 1.
    """

    def __init__(self, folder: Path, *, sizes: tuple[int, int] = SIZES) -> None:
        """Draw and encode the rows; dev has 12 of each task."""
        self.backbone: Backbone = open_backbone(folder)
        tasks = (task_of(), kind_task("classification", name="other"))
        draws: tuple[Any, Any] = (examples_of, kind_examples)
        self.sources = [
            Source(
                slot=slot,
                task=task,
                train=encode_for(folder, draw("classification", size, seed=1), task),
                dev=encode_for(folder, draw("classification", 12, seed=2), task),
            )
            for slot, (task, draw, size) in enumerate(zip(tasks, draws, sizes, strict=True))
        ]

    def model(self, config: TrainConfig) -> PromptedModel:
        """Return a model before its first step: one prompt, a head a task."""
        slots = [new_slot(self.backbone, s.task, config, s.train) for s in self.sources]
        shared = (slots[0][0], config.prompt)
        bank = PromptBank(self.backbone.spec.shape, [shared] * len(slots))
        return PromptedModel(self.backbone, bank, [head for _, head in slots])

    def start(self, model: PromptedModel, config: TrainConfig, **how: Any) -> Iterator[TrainReport]:
        """Return the reports of fit_together()."""
        return fit_together(model, self.sources, config=config, **how)

    def run(self, config: TrainConfig, **how: Any) -> tuple[PromptedModel, list[TrainReport]]:
        """Train a new model to the end."""
        model = self.model(config)
        return model, list(self.start(model, config, **how))


def train_together_step_by_step(
    connection: Connection, folder: Path, out: Path, config: TrainConfig
) -> None:
    """Train with a checkpoint, wait for a word after each report, and write the weights."""
    bench = SharedBench(folder)
    model = bench.model(config)
    checkpoint = Checkpoint(out / "checkpoint.safetensors", every_steps=2)
    for report in bench.start(model, config, temperature=2.0, checkpoint=checkpoint):
        connection.send(report.step)
        connection.recv()
    for slot in range(2):
        data = safetensors.torch.save(Weights.of(model, slot).named())
        write_bytes_atomic(out / f"{slot}.safetensors", data)
    checkpoint.remove()
    connection.send("done")
