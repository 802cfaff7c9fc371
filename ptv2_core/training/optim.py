"""The optimizer over the trainable names, and the learning rate as a function of the step."""

from collections.abc import Mapping

import torch
from torch import nn

from ptv2_core.config import TrainConfig


def learning_rate_factor(step: int, *, total_steps: int, warmup_fraction: float) -> float:
    """Return the share of the peak learning rate at a step: linear up, then linear down to 0.

    Args:
        step: Counted from 0.
        total_steps: Of the whole training.
        warmup_fraction: Share of them that rises.
    """
    warmup = round(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> torch.optim.AdamW:
    """Return AdamW with a group for the heads and one for what the method trains beside them.

    Each group keeps its peak learning rate under the key `peak`.

    Args:
        parameters: By their names in the model.
        config: Learning rates and weight decay.
    """
    own = [p for name, p in parameters.items() if not name.startswith("heads.")]
    heads = [p for name, p in parameters.items() if name.startswith("heads.")]
    head_rate = config.head_learning_rate or config.learning_rate
    if config.method == "probe":
        head_rate = config.learning_rate
    groups = [
        {"params": own, "lr": config.learning_rate, "peak": config.learning_rate},
        {"params": heads, "lr": head_rate, "peak": head_rate},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
