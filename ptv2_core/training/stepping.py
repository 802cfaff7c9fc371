"""A step of learners that share a model: one forward and one backward pass for all of them."""

from collections.abc import Sequence

import torch

from ptv2_core.errors import MemoryRanOutError, TrainingError
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.learner import Learner
from ptv2_core.training.records import TrainReport


def take_step(
    model: PromptedModel, learners: Sequence[Learner]
) -> list[TrainReport | TrainingError]:
    """Take one step of each learner.

    Args:
        model: Holds their slots.
        learners: None of them done, and with backbone dropout one alone.

    Returns:
        For each its report, or why its step was not taken; that of the others was.
    """
    return finish_step(learners, compute_gradients(model, learners))


def compute_gradients(model: PromptedModel, learners: Sequence[Learner]) -> list[float]:
    """Return each learner's loss, whose gradients are there; arguments as for `take_step`."""
    model.train()
    works = [learner.next_work() for learner in learners]
    config = learners[0].config
    with model.backbone.dropout(learners[0].seed if config.backbone_dropout else None):
        recompute = any(learner.config.gradient_checkpointing for learner in learners)
        values = [0.0] * len(works)
        busy = [place for place, work in enumerate(works) if len(work.batch.rows)]
        if busy:
            answers = model.answer([works[place].part for place in busy], recompute=recompute)
            losses = [
                works[place].loss(logits) for place, logits in zip(busy, answers, strict=True)
            ]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            for place, loss in zip(busy, losses, strict=True):
                values[place] = float(loss.detach())
    return values


def finish_step(
    learners: Sequence[Learner], losses: Sequence[float]
) -> list[TrainReport | TrainingError]:
    """Let each learner take the step whose gradients are there; returns as `take_step`."""
    results: list[TrainReport | TrainingError] = []
    for learner, loss in zip(learners, losses, strict=True):
        try:
            results.append(learner.finish(loss))
        except TrainingError as error:
            results.append(error)
        except Exception as error:
            if not is_memory(error):
                raise
            results.append(ran_out(error))
    return results


def is_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError | MemoryRanOutError) or (
        isinstance(error, RuntimeError) and ("alloc" in words or "out of memory" in words)
    )


def ran_out(error: BaseException) -> MemoryRanOutError:
    """Return an exception that `is_memory` as one of ours, in its own words."""
    return MemoryRanOutError(f"{type(error).__name__}: {error}")
