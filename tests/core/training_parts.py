"""Parts that the tests of training share: rows, settings, models, and what a training leaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ptv2_core.artifact import Weights, save_artifact
from ptv2_core.config import TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskKind, TaskSpec
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit
from ptv2_core.training.learner import Learner
from ptv2_core.training.records import TrainReport
from ptv2_core.training.sources import Source
from ptv2_core.training.start import new_model, resolve_head
from ptv2_core.training.trunk import TrunkCache
from tests.core.kind_parts import kind_examples, kind_task
from tests.tiny import encode_for, examples_of, open_backbone, task_of

QUICK: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "head_learning_rate": None,
    "prompt": {"length": 4},
}

# of each method, a learning rate at which it learns in a few steps
RATES = {"ptv2": 2e-2, "prompt_tuning": 5e-2, "finetune": 1e-3, "probe": 5e-2}


def settings(**changes: Any) -> TrainConfig:
    """Return quick settings; the prompt starts at random unless they say otherwise."""
    values = {**QUICK, **changes}
    prompt = {"start": "normal", "start_attention": None, **values["prompt"]}
    return TrainConfig.from_mapping({**values, "prompt": prompt})


class Bench:
    """A tiny backbone with the rows of a task, on which trainings are started.

    Attributes:
        folder: Of the backbone.
        task: Of `kind`.
        train: Rows to learn from.
        dev: Rows that choose the epoch.
        backbone: Loaded once; it is frozen.
    """

    def __init__(
        self, folder: Path, kind: str = "classification", *, rows: tuple[int, int] = (60, 24)
    ) -> None:
        """Draw and encode the rows."""
        self.folder = folder
        is_plain = kind in ("classification", "tagging")
        self.task: TaskSpec = task_of(kind) if is_plain else kind_task(cast("TaskKind", kind))
        draw: Any = examples_of if is_plain else kind_examples
        self.train: EncodedSplit
        self.dev: EncodedSplit
        self.train, self.dev = (
            encode_for(folder, draw(kind, count, seed=count), self.task) for count in rows
        )
        self.backbone: Backbone = open_backbone(folder)

    def model(self, config: TrainConfig) -> PromptedModel:
        """Return a model before its first step."""
        return new_model(self.backbone, self.task, config, self.train)

    def start(
        self,
        model: PromptedModel,
        config: TrainConfig,
        *,
        trunk: TrunkCache | None = None,
        checkpoint: Checkpoint | None = None,
        team: Team | None = None,
    ) -> Iterator[TrainReport]:
        """Return fit()'s reports."""
        return fit(
            model,
            task=self.task,
            train=self.train,
            dev=self.dev,
            config=config,
            trunk=trunk,
            checkpoint=checkpoint,
            team=team,
        )

    def run(
        self, config: TrainConfig, *, trunk: TrunkCache | None = None
    ) -> tuple[PromptedModel, list[TrainReport]]:
        """Train a new model to the end."""
        model = self.model(config)
        return model, list(self.start(model, config, trunk=trunk))


def weights(model: PromptedModel, slot: int = 0) -> dict[str, Tensor]:
    """Return copies of a slot's trained tensors, named as in slot 0."""
    own = {f"bank.slots.{slot}.": "bank.slots.0.", f"heads.{slot}.": "heads.0."}
    copies = {}
    for name, parameter in model.trainable(slot):
        prefix = next((prefix for prefix in own if name.startswith(prefix)), "")
        known_as = own.get(prefix, "") + name.removeprefix(prefix)
        copies[known_as] = parameter.detach().clone()
    return copies


def of_method(method: str, **changes: Any) -> TrainConfig:
    """Return quick settings of a method."""
    return settings(**{"method": method, "learning_rate": RATES[method], **changes})


def learner_of(
    bench: Bench, model: PromptedModel, config: TrainConfig, *, team: Team | None = None
) -> Learner:
    """Return a learner of slot 0 before its first step."""
    source = Source(slot=0, task=bench.task, train=bench.train, dev=bench.dev)
    return Learner(model, [source], config=config, team=team)


def save_trained(
    folder: Path, model: PromptedModel, bench: Bench, config: TrainConfig, *, max_length: int = 32
) -> Path:
    """Save slot 0 as an artifact, without golden inputs; returns `folder`."""
    save_artifact(
        folder,
        Weights.of(model),
        task=bench.task,
        method=config.method,
        prompt=config.prompt,
        head=resolve_head(config.head, bench.backbone),
        backbone=bench.backbone.spec.to_mapping(),
        tokenizer_digest=locate(str(bench.folder)).tokenizer_digest(),
        encoding={"max_length": max_length},
        decoding={},
        training=config.to_mapping(),
        provenance={},
        metrics={},
        golden=[],
    )
    return folder


def backward(total: Tensor) -> None:
    """Run the backward pass of a scalar."""
    total.backward()  # type: ignore[no-untyped-call]


def gradients(model: PromptedModel, slot: int = 0) -> dict[str, Tensor]:
    """Return copies of a slot's gradients, and forget them on the model."""
    copies = {}
    for name, parameter in model.trainable(slot):
        assert parameter.grad is not None, name
        copies[name] = parameter.grad.clone()
        parameter.grad = None
    return copies


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert the same names and the same bits."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], *, atol: float) -> None:
    """Assert the same names, and values not further apart than `atol`."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=atol, rtol=0.0, msg=None)


def epoch_rows(reports: list[TrainReport]) -> list[tuple[float, float, float]]:
    """Return train loss, dev loss and dev score of each epoch."""
    return [(e.train_loss, e.dev_loss, e.dev_score) for e in reports[-1].history]


def padded(rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]` and the mask of real tokens."""
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask
