"""Packed linear layers: the same products, and the same prompts out of a training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptv2_core.config import PromptConfig
from ptv2_core.model.backbones import loading
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.packing import PackedLinear, can_pack, pack
from tests.tiny import tiny_model

Folder = Callable[[str], Path]
needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no packed products")


@needs_packing
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5), (2100,)])
@pytest.mark.parametrize("bias", [True, False])
def test_packing_gives_the_products_of_the_linear_layer(rows: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(*rows, 40, generator=generator).bfloat16()
    gradient = torch.randn(*rows, 24, generator=generator).bfloat16()
    plain, packed = (states.clone().requires_grad_() for _ in range(2))
    linear(plain).backward(gradient)
    PackedLinear(linear)(packed).backward(gradient)
    torch.testing.assert_close(PackedLinear(linear)(states), linear(states))
    torch.testing.assert_close(packed.grad, plain.grad)
    exact = gradient.double() @ linear.weight.double()
    torch.testing.assert_close(packed.grad.double(), exact, atol=0.03, rtol=0.01)


@needs_packing
def test_packing_gives_the_products_of_gpt2s_own_layers() -> None:
    generator = torch.Generator().manual_seed(3)
    layer = Conv1D(24, 40).bfloat16().requires_grad_(False)
    layer.bias.copy_(torch.linspace(-1, 1, 24))
    packed = nn.Sequential(layer)
    pack(packed)
    assert type(packed[0]) is PackedLinear
    states = torch.randn(3, 5, 40, generator=generator).bfloat16()
    gradient = torch.randn(3, 5, 24, generator=generator).bfloat16()
    one, other = (states.clone().requires_grad_() for _ in range(2))
    layer(one).backward(gradient)
    packed(other).backward(gradient)
    torch.testing.assert_close(packed(states), layer(states))
    torch.testing.assert_close(other.grad, one.grad, atol=1e-3, rtol=0.02)


@needs_packing
def test_packing_is_for_bf16_on_the_cpu_alone(backbone_folder: Folder) -> None:
    folder = str(backbone_folder("bert"))
    kinds = {}
    for precision in ("fp32", "bf16"):
        backbone = load_backbone(folder, precision=precision, device="cpu")  # type: ignore[arg-type]
        kinds[precision] = [type(m) for m in backbone.model.modules() if "Linear" in str(type(m))]
    assert set(kinds["fp32"]) == {nn.Linear}
    assert set(kinds["bf16"]) == {PackedLinear}
    assert len(kinds["bf16"]) == len(kinds["fp32"]) == 3 * 6 + 1  # and the pooler


def test_packing_that_torch_does_not_offer_is_done_without(
    backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(backbone_folder("bert"))

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        model = tiny_model(
            load_backbone(folder, precision="bf16", device="cpu"), PromptConfig(length=4)
        )
        ids = torch.tensor([[2, 7, 8, 3], [2, 11, 3, 0]])
        logits = model(ids, ids > 0)
        logits.square().sum().backward()
        return logits.detach(), model.bank.slots[0].weight.grad

    packed = gradients()
    monkeypatch.setattr(loading, "can_pack", lambda: False)
    plain = gradients()
    torch.testing.assert_close(packed[0], plain[0], atol=2e-2, rtol=2e-2)
    difference = (packed[1] - plain[1]).norm() / plain[1].norm()
    assert difference < 0.03  # bf16 keeps 8 bits


def test_packing_is_refused_where_the_operator_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Gone())
    assert not can_pack()


@needs_packing
def test_packing_makes_the_backward_layout_when_it_is_asked_for() -> None:
    linear = nn.Linear(40, 24, dtype=torch.bfloat16).requires_grad_(False)
    packed = PackedLinear(linear)
    packed(torch.ones(3, 40, dtype=torch.bfloat16))
    assert packed._layouts._backward is None
    assert torch.equal(packed._layouts.forward.to_dense(), linear.weight)
    assert torch.equal(packed._layouts.backward.to_dense(), linear.weight.t())


@needs_packing
def test_packing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert can_pack()
    assert torch.equal(torch.get_rng_state(), before)
