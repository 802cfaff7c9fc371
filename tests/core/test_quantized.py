"""A backbone in int8 answers like the one it was rounded from, each row for itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.quantized import Int8Linear
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank

Folder = Callable[[str], Path]


def linear(inputs: int = 24, outputs: int = 40) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def test_int8_linear_equals_whole_number_arithmetic() -> None:
    given = linear()
    states = torch.randn(5, 24)
    weight = given.weight.detach()
    by_output, by_row = weight.abs().amax(1) / 127, states.abs().amax(1) / 127
    # exact in float64: sums of products of whole numbers
    numbers = (weight / by_output[:, None]).round().double()
    rows = (states / by_row[:, None]).round().double()
    expected = (rows @ numbers.T) * by_row[:, None] * by_output + given.bias
    found = Int8Linear(given)(states)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, given(states), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_answers_a_row_alike_alone_and_among_others(dtype: torch.dtype) -> None:
    layer = Int8Linear(linear())
    states = torch.randn(3, 7, 24) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    states = states.to(dtype)
    whole = layer(states)
    assert whole.shape == (3, 7, 40)
    assert whole.dtype == states.dtype
    for row in range(3):
        assert torch.equal(layer(states[row : row + 1]), whole[row : row + 1])


def test_int8_linear_of_zeros_is_its_bias() -> None:
    given = linear()
    assert torch.equal(Int8Linear(given)(torch.zeros(1, 24))[0], given.bias)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_backbone_in_int8_is_close_to_fp32(model_type: str, backbone_folder: Folder) -> None:
    name = str(backbone_folder(model_type))
    ids, mask = torch.arange(5, 17).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    found = {}
    for precision in ("fp32", "int8"):
        backbone = load_backbone(name, device="cpu", precision=precision)
        model = PromptedModel(backbone, PromptBank(backbone.spec.shape), [])
        with torch.no_grad():
            found[precision] = model.encode(ids, mask, slots=-1).hidden
    similar = torch.cosine_similarity(found["fp32"], found["int8"], dim=-1)
    assert float(similar.min()) > 0.99
    assert not torch.equal(found["fp32"], found["int8"])


def test_backbone_in_int8_is_not_trained(backbone_folder: Folder) -> None:
    with pytest.raises(BackboneError, match="int8 is for answering on a CPU"):
        load_backbone(str(backbone_folder("bert")), precision="int8", tunable=True)
