"""Linear layers of a frozen backbone, laid out for the CPU's bf16 products once and for all.

oneDNN lays a weight out anew at each product. A frozen weight can stay as it likes it, in place of
the plain tensor: in one layout for the forward pass and, from the first backward pass on, in
another for that.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ptv2_core.model.backbones.projections import replace_projections

# rows of the products the layouts are chosen for; any other number gives the same result
TYPICAL_ROWS = 2048


class PackedLinear(nn.Module):
    """`nn.Linear` with frozen weights, for bf16 on a CPU.

    Its layouts are opaque to all but these products: they are in no state dictionary, and cannot
    be copied or moved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the weights of `linear`."""
        super().__init__()
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._layouts = Layouts(linear.weight.detach())

    @property
    def hidden_bytes(self) -> int:
        """What its layouts take, which are no parameters."""
        return self._layouts.size_bytes

    def forward(self, states: Tensor) -> Tensor:
        """Return `[..., outputs]` for `[..., inputs]`."""
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            states, self._layouts, self.bias
        )
        return product


class Layouts:
    """One weight `[outputs, inputs]`, laid out for either pass."""

    def __init__(self, weight: Tensor) -> None:
        """Lay it out for the forward pass."""
        self.forward = _packed(weight)
        self._backward: Tensor | None = None

    @property
    def backward(self) -> Tensor:
        """The transposed weight; made when it is first asked for, which answering never does."""
        if self._backward is None:
            self._backward = _packed(self.forward.to_dense().t().contiguous())
        return self._backward

    @property
    def size_bytes(self) -> int:
        """What they take, without what oneDNN may pad them with."""
        held = (self.forward, self._backward)
        return sum(one.numel() * one.dtype.itemsize for one in held if one is not None)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, layouts: Layouts, bias: Tensor | None) -> Tensor:
        ctx.layouts = layouts
        return _product(states, layouts.forward, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradient.contiguous(), ctx.layouts.backward, None), None, None


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    return packed


def _product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return product


def can_pack() -> bool:
    """Tell whether this torch has the products, and they are right."""
    # not nn.Linear(): that would draw from the global random state
    linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, 32, 48, dtype=torch.bfloat16, device="cpu"
    )
    linear.requires_grad_(False)
    linear.weight.copy_(torch.linspace(-1.0, 1.0, 48 * 32).view(48, 32))
    linear.bias.copy_(torch.linspace(1.0, -1.0, 48))
    states = torch.linspace(-1.0, 1.0, 64, dtype=torch.bfloat16).view(2, 32)
    try:
        found = PackedLinear(linear)(states)
    except (AttributeError, RuntimeError):  # operators that torch promises nobody
        return False
    return torch.allclose(found, linear(states), atol=0.1, rtol=0.02)


def pack(model: nn.Module) -> None:
    """Replace every linear layer in a frozen bf16 model on the CPU; its answers stay the same."""
    replace_projections(model, PackedLinear)
