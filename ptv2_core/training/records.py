"""What a training says of itself, and the best of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_core.evaluation.scoring import Evaluation


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What the prompt of one layer was at the end of an epoch.

    Attributes:
        layer: Which; 0 is the lowest.
        attention: As in `LayerFigures`, measured on dev, like the next four.
        key_norm: Likewise.
        value_norm: Likewise.
        key_rank: Likewise.
        value_rank: Likewise.
        moved: Norm of the change since the start, as a share of the norm of the prompt.
        gradient_norm: Of the loss with respect to the layer's prompt before clipping, mean over
            the epoch's steps; None at the start, and where an MLP makes the prompt.
    """

    layer: int
    attention: float
    key_norm: float
    value_norm: float
    key_rank: float
    value_rank: float
    moved: float
    gradient_norm: float | None


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """How an epoch ended.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean over its steps.
        dev_loss: In nats.
        dev_score: The task's metric.
        learning_rate: Of the prompt in its last step.
        is_best: Whether it was the best so far.
        seconds: Of training until its end, those before a resume too.
        layers: Of each layer with a prompt, where that was asked for.
    """

    epoch: int
    train_loss: float
    dev_loss: float
    dev_score: float
    learning_rate: float
    is_best: bool
    seconds: float = field(compare=False)
    layers: tuple[LayerRecord, ...] = ()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "EpochRecord":
        """Return the record whose `asdict` this is, as JSON gives it back."""
        return cls(**{**values, "layers": tuple(LayerRecord(**one) for one in values["layers"])})


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """One step; the last of an epoch carries an evaluation.

    Attributes:
        step: Counted from 1; of the first report of a resumed training, the step it goes on from.
        total_steps: Of the whole training, were it not stopped early.
        epoch: Counted from 1.
        train_loss: Of the step's batch; with an evaluation, the epoch's mean over its steps.
        learning_rate: Of the prompt in this step.
        grad_norm: Before clipping.
        history: The epochs so far, those before a resume too.
        evaluation: On dev, at the end of an epoch.
        is_best: Whether that evaluation is the best so far.
        is_resumed: Whether this is no step, but the place from which a killed training goes on.
        start_layers: Of each layer with a prompt before the first step, where that was asked for.
    """

    step: int
    total_steps: int
    epoch: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    history: Sequence[EpochRecord]
    evaluation: Evaluation | None = None
    is_best: bool = False
    is_resumed: bool = False
    start_layers: tuple[LayerRecord, ...] = ()


class Best:
    """Keeps the weights of the best epoch, and when anything last got better.

    A higher score wins; at equal scores the lower dev loss does, which tells epochs apart on small
    development sets.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        """Hold nothing yet."""
        self._parameters = parameters
        self.weights: dict[str, Tensor] = {}
        self._score = -math.inf
        self._loss = math.inf
        self._lowest_loss = math.inf
        self.last_progress = 0

    def offer(self, evaluation: Evaluation, epoch: int) -> bool:
        """Keep the weights if the evaluation is the best so far; say whether it is."""
        # a falling loss is progress too: late starters show it epochs before their score moves
        if evaluation.score > self._score or evaluation.loss < self._lowest_loss:
            self.last_progress = epoch
        self._lowest_loss = min(self._lowest_loss, evaluation.loss)
        if (evaluation.score, -evaluation.loss) <= (self._score, -self._loss):
            return False
        self._score, self._loss = evaluation.score, evaluation.loss
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        return True

    def restore(self) -> None:
        """Put the kept weights back, if there are any."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                self._parameters[name].copy_(weight)

    def counters(self) -> dict[str, float] | None:
        """Return what `resume` takes; None before the first epoch."""
        if not self.weights:
            return None
        return {
            "score": self._score,
            "loss": self._loss,
            "lowest_loss": self._lowest_loss,
            "last_progress": self.last_progress,
        }

    def resume(self, weights: dict[str, Tensor], counters: dict[str, float] | None) -> None:
        """Hold what another held."""
        if counters is None:
            return
        self.weights = {
            name: weight.to(self._parameters[name].device) for name, weight in weights.items()
        }
        self._score, self._loss = counters["score"], counters["loss"]
        self._lowest_loss = counters["lowest_loss"]
        self.last_progress = int(counters["last_progress"])
