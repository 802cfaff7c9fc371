"""fit(): the training loop as a generator; the caller owns every side effect."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptv2_core.config import TrainConfig
from ptv2_core.data.batching import Batch, collate, shuffled_batches
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import TrainingError
from ptv2_core.evaluation.scoring import Evaluation, cross_entropy, evaluate_model
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.optim import learning_rate_factor, make_optimizer, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """One step; the last of an epoch carries an evaluation.

    Attributes:
        step: Counted from 1.
        total_steps: Of the whole training, were it not stopped early.
        epoch: Counted from 1.
        train_loss: Of the step's batch; with an evaluation, the epoch's mean over its steps.
        learning_rate: Of the prompt in this step.
        grad_norm: Before clipping.
        evaluation: On dev, at the end of an epoch.
        is_best: Whether that evaluation is the best so far.
    """

    step: int
    total_steps: int
    epoch: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    evaluation: Evaluation | None = None
    is_best: bool = False


def fit(
    model: PromptedModel,
    *,
    task: TaskSpec,
    train: EncodedSplit,
    dev: EncodedSplit,
    config: TrainConfig,
) -> Iterator[TrainReport]:
    """Train slot 0 of a model.

    However the iteration ends, the model is left with the weights of the best epoch so far.

    Args:
        model: Its prompt and head are trained in place.
        task: Labels and metric.
        train: Rows to learn from.
        dev: Rows that choose the epoch.
        config: Everything else.

    Yields:
        A report a step.

    Raises:
        TrainingError: The loss is not finite; the step that would spread it is not taken.
    """
    plan = [
        shuffled_batches(
            train.lengths,
            batch_size=config.batch_size,
            token_budget=config.token_budget,
            seed=config.seed,
            epoch=epoch,
        )
        for epoch in range(config.epochs)
    ]
    total = sum(len(batches) for batches in plan)
    optimizer = make_optimizer(model, config)
    best = Best(model)
    step = 0
    try:
        for epoch, batches in enumerate(plan, start=1):
            losses: list[float] = []
            for place, rows in enumerate(batches, start=1):
                factor = learning_rate_factor(
                    step, total_steps=total, warmup_fraction=config.warmup_fraction
                )
                set_learning_rate(optimizer, factor)
                step += 1
                loss, norm = _step(model, optimizer, collate(train, rows), config, step, epoch)
                losses.append(loss)
                is_last = place == len(batches)
                evaluation = None
                if is_last:
                    evaluation = evaluate_model(model, dev, task, token_budget=config.token_budget)
                yield TrainReport(
                    step=step,
                    total_steps=total,
                    epoch=epoch,
                    train_loss=float(np.mean(losses)) if is_last else loss,
                    learning_rate=config.learning_rate * factor,
                    grad_norm=norm,
                    evaluation=evaluation,
                    is_best=evaluation is not None and best.offer(evaluation, epoch),
                )
            if epoch - best.last_progress >= config.patience:
                return
    finally:
        best.restore()


class Best:
    """Keeps the trainable weights of the best epoch, and when anything last got better.

    A higher score wins; at equal scores the lower dev loss does, which tells epochs apart on small
    development sets.
    """

    def __init__(self, model: PromptedModel) -> None:
        """Hold nothing yet."""
        self._model = model
        self._weights: dict[str, Tensor] = {}
        self._key = (-math.inf, -math.inf)
        self._lowest_loss = math.inf
        self.last_progress = 0

    def offer(self, evaluation: Evaluation, epoch: int) -> bool:
        """Keep the model's weights if the evaluation is the best so far; say whether it is."""
        key = (evaluation.score, -evaluation.loss)
        # a falling loss is progress too: late starters show it epochs before their score moves
        if evaluation.score > self._key[0] or evaluation.loss < self._lowest_loss:
            self.last_progress = epoch
        self._lowest_loss = min(self._lowest_loss, evaluation.loss)
        if key <= self._key:
            return False
        self._key = key
        self._weights = {name: p.detach().clone() for name, p in self._model.trainable()}
        return True

    def restore(self) -> None:
        """Put the kept weights back, if there are any."""
        with torch.no_grad():
            for name, parameter in self._model.trainable():
                if name in self._weights:
                    parameter.copy_(self._weights[name])


def _step(
    model: PromptedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    step: int,
    epoch: int,
) -> tuple[float, float]:
    """Take one step and return loss and gradient norm; dropout is a function of (seed, step)."""
    device = model.backbone.device
    model.train()
    moved = batch.to(device)
    assert moved.labels is not None, "training rows have labels"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_step_seed(config.seed, step))
        logits = model(moved.input_ids, moved.token_mask, moved.token_type_ids)
        loss = cross_entropy(logits, moved.labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for _, parameter in model.trainable()]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise TrainingError(
            f"loss {value} and gradient norm {norm} at step {step} (epoch {epoch}) are not both "
            f"finite; the step was not taken. Lower train.learning_rate ({config.learning_rate:g}) "
            "or set backbone.precision to fp32."
        )
    optimizer.step()
    return value, norm


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
