"""Where a frozen model multiplies by a weight: its linear layers, GPT-2's own kind of them too."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def replace_projections(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `make` makes of a linear layer in the place of each one in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
            elif type(child) is Conv1D:
                setattr(parent, name, make(_as_linear(child)))


def _as_linear(layer: Conv1D) -> nn.Linear:
    """Return the same product as a linear layer, whose weight stands the other way round."""
    inputs, outputs = layer.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs)
    weight = layer.weight.detach().t().contiguous()  # [inputs, outputs] -> [outputs, inputs]
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear
