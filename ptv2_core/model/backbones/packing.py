"""Linear layers of a frozen backbone, laid out for the CPU's bf16 products once and for all.

oneDNN lays a weight out anew at each product. A frozen weight can stay as it likes it: one layout
for the forward pass and one for the backward, in place of the plain tensor.
"""

from typing import Any

import torch
from torch import Tensor, nn

# rows of the products the layouts are chosen for; any other number gives the same result
TYPICAL_ROWS = 2048


class PackedLinear(nn.Module):
    """`nn.Linear` with frozen weights, for bf16 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the weights of `linear`."""
        super().__init__()
        weight = linear.weight.detach()
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._forward = _packed(weight)  # [outputs, inputs]
        self._backward = _packed(weight.t().contiguous())

    def forward(self, states: Tensor) -> Tensor:
        """Return `[..., outputs]` for `[..., inputs]`."""
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            states, self._forward, self._backward, self.bias
        )
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.packed = backward
        return _product(states, forward, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(gradient.contiguous(), ctx.packed, None), None, None, None


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    return packed


def _product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return product


def can_pack() -> bool:
    """Tell whether this torch has the products, and they are right."""
    linear = nn.Linear(32, 48, dtype=torch.bfloat16, device="cpu").requires_grad_(False)
    states = torch.linspace(-1.0, 1.0, 64, dtype=torch.bfloat16).view(2, 32)
    try:
        found = PackedLinear(linear)(states)
    except (AttributeError, RuntimeError):  # operators that torch promises nobody
        return False
    return torch.allclose(found, linear(states), atol=0.05)


def pack(model: nn.Module) -> None:
    """Replace every `nn.Linear` in a frozen bf16 model on the CPU; its answers stay the same."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
