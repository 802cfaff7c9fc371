"""Attention over prompts and tokens, against arithmetic in fp64 that is rounded where ours is."""

import pytest
import torch
from torch import nn

from ptv2_core.model.attention import LayerBatch, prompted_attention

BARE = LayerBatch(layer=0, prompt=None, mask=None)


# a block of bf16 keys and more than one, and a rest behind it, short and long
@pytest.mark.parametrize("keys", [9, 32, 48, 64, 127, 132])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_rounds_its_weights_once(keys: int, is_masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, keys, 8).bfloat16() for _ in range(3))
    mask = None
    if is_masked:
        mask = torch.zeros(2, 1, 1, keys).bfloat16()
        mask[1, ..., keys // 2 :] = float("-inf")
    layer = LayerBatch(layer=0, prompt=None, mask=mask)
    found, _ = prompted_attention(
        nn.Identity(), query, key, value, None, scaling=0.5, prompts=layer
    )
    scores = (query * 0.5) @ key.transpose(2, 3)
    exact = (scores.double() if mask is None else scores.double() + mask.double()).softmax(dim=-1)
    expected = (exact.bfloat16() @ value).transpose(1, 2)
    # a weight of fp32 may lie on the other side of what bf16 rounds at
    assert (found != expected).float().mean() < 0.01
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)


def test_attention_of_fp32_is_that_of_fp64() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 40, 8) for _ in range(3))
    found, _ = prompted_attention(nn.Identity(), query, key, value, None, scaling=0.5, prompts=BARE)
    exact = (query.double() * 0.5 @ key.double().transpose(2, 3)).softmax(dim=-1) @ value.double()
    torch.testing.assert_close(found.double(), exact.transpose(1, 2), atol=1e-6, rtol=1e-5)
