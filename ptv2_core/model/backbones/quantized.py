"""Linear layers of a frozen backbone in int8, for answering on a CPU.

Weights have a scale for each output, states one for each row. So a row's answer depends on no
other row of its batch, which one scale for all states would not give.
"""

import torch
from torch import Tensor, nn

from ptv2_core.model.backbones.projections import replace_projections

LEVELS = 127
# of a row of zeros
SMALLEST = 1e-12


class Int8Linear(nn.Module):
    """`nn.Linear` with weights rounded to int8; it has no gradient.

    Its weights are in no state dictionary, and cannot be moved or cast.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weights of `linear`, to nearest, symmetrically about zero."""
        super().__init__()
        weight = linear.weight.detach().float()  # [outputs, inputs]
        self._scale = weight.abs().amax(dim=1).clamp(min=SMALLEST) / LEVELS
        self._weight = (weight / self._scale[:, None]).round().to(torch.int8)
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    @property
    def hidden_bytes(self) -> int:
        """What its weights take, which are no parameters."""
        held = (self._weight, self._scale, self._bias)
        return sum(one.nbytes for one in held if one is not None)

    def forward(self, states: Tensor) -> Tensor:
        """Return `[..., outputs]` for `[..., inputs]`, in the format of the states."""
        # [..., inputs] -> [rows, inputs], and all that follows in place: it is memory that costs
        flat = states.reshape(-1, states.shape[-1]).to(torch.float32, copy=True)
        highest, lowest = flat.amax(dim=1, keepdim=True), flat.amin(dim=1, keepdim=True)
        scale = torch.maximum(highest, lowest.neg_()).clamp_(min=SMALLEST).div_(LEVELS)
        rounded = flat.div_(scale).round_().to(torch.int8)
        product = torch._int_mm(rounded, self._weight.t()).float().mul_(scale).mul_(self._scale)
        if self._bias is not None:
            product.add_(self._bias)
        return product.to(states.dtype).view(*states.shape[:-1], -1)


def quantize(model: nn.Module) -> None:
    """Replace every linear layer in a frozen model on the CPU."""
    replace_projections(model, Int8Linear)
