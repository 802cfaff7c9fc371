"""Attention over prompts and tokens, behind Transformers' attention interface.

Letters: B rows, T tokens, P prompt length, L layers, N key/value heads, D head size,
S = P + T keys.

The prompts of a batch travel as one keyword argument of the backbone's forward and arrive here
with every layer's call, so nothing is kept on a module between two calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ptv2_core.model.prompts import LayerPrompt

ATTENTION_NAME = "ptv2"


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What one layer computed of a batch's tokens, without gradients.

    Attributes:
        layer: Which; 0 is the lowest.
        query: `[B, N, T, D]`.
        key: `[B, N, T, D]`.
        value: `[B, N, T, D]`.
        scaling: The layer's factor on the scores.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """The prompts of one batch, for every layer.

    Attributes:
        layers: Each layer's keys and values; None where no row has a prompt.
        masks: For each layer `[B, 1, 1, S]`, 0 where a key is seen and minus infinity where not;
            None: all are seen.
        captured: Where given, every layer appends to it what it computed of its own tokens.
    """

    layers: Sequence[LayerPrompt | None]
    masks: Sequence[Tensor | None]
    captured: list[Captured] | None = field(default=None)

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerPrompt | None],
        token_mask: Tensor,
        dtype: torch.dtype,
        captured: list[Captured] | None = None,
    ) -> "PromptBatch":
        """Make the masks of each layer, one for layers that are alike.

        Args:
            layers: As above.
            token_mask: `[B, T]`, true at real tokens.
            dtype: Of the states.
            captured: As above.
        """
        made: dict[tuple[int, int], Tensor | None] = {}
        masks = []
        for layer in layers:
            length = 0 if layer is None else layer.keys.shape[2]
            own = None if layer is None else layer.mask
            alike = (length, id(own))
            if alike not in made:
                made[alike] = additive_mask(token_mask, own, length, dtype)
            masks.append(made[alike])
        return cls(layers=layers, masks=masks, captured=captured)


def additive_mask(
    token_mask: Tensor, prompt_mask: Tensor | None, prompt_length: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the mask `[B, 1, 1, S]` over prompt and token keys, or None where all are seen.

    Args:
        token_mask: `[B, T]`, true at real tokens.
        prompt_mask: `[B, P]`, true at positions of the row's own prompt; None: all are.
        prompt_length: P.
        dtype: Of the states.
    """
    if bool(token_mask.all()) and (prompt_mask is None or bool(prompt_mask.all())):
        return None
    if prompt_mask is None:
        prompt_mask = token_mask.new_ones(token_mask.shape[0], prompt_length)
    seen = torch.cat([prompt_mask, token_mask], dim=1)  # [B, S]
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, float("-inf"))[:, None, None, :]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention weights `[B, N, T, S]`, in the format of the states.

    The softmax of a bf16 tensor is computed in fp32 and rounded once, inside torch.
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    weights = torch.softmax(scores if mask is None else scores.add_(mask), dim=-1)
    return weights.to(query.dtype)  # autocast leaves them in fp32


class _CpuAttention(torch.autograd.Function):
    """Two products and a softmax: torch's bf16 SDPA on CPU is 2 to 5 times slower.

    Nothing is kept for the backward pass but the weights and what made them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        weights = _weights(query, key, mask, scaling)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling = scaling
        return weights @ value

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        query, key, value, weights = ctx.saved_tensors
        of_query, of_key, of_value, *_ = ctx.needs_input_grad
        by_value = weights.transpose(2, 3) @ gradient if of_value else None
        by_weights = gradient @ value.transpose(2, 3)
        # of the softmax: dS = W * (dW - sum(dW * W)), in fp32 inside
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        by_scores *= ctx.scaling
        by_query = by_scores @ key if of_query else None
        by_key = by_scores.transpose(2, 3) @ query if of_key else None
        return by_query, by_key, by_value, None, None


def prompted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    prompts: PromptBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend `[B, N, T, D]` queries over the row's prompt and tokens; returns `[B, T, N, D]`.

    Args:
        module: The layer's attention module; its `layer_idx` picks the layer's prompts.
        query: `[B, N, T, D]`.
        key: `[B, N, T, D]`.
        value: `[B, N, T, D]`.
        attention_mask: Always None; the mask over prompt and tokens is in `prompts`.
        scaling: Factor on the scores.
        dropout: Probability of dropping an attention weight; 0 unless the backbone trains.
        prompts: The batch's prompts and mask.
    """
    place = int(module.layer_idx)  # type: ignore[arg-type]
    if prompts.captured is not None:
        prompts.captured.append(
            Captured(
                layer=place,
                query=query.detach(),
                key=key.detach(),
                value=value.detach(),
                scaling=scaling,
            )
        )
    prompt, mask = prompts.layers[place], prompts.masks[place]
    if prompt is not None:
        rows = query.shape[0]
        key = torch.cat([prompt.keys.expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([prompt.values.expand(rows, -1, -1, -1), value], dim=2)
    if query.device.type != "cpu":
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    elif dropout > 0.0:
        output = nn.functional.dropout(_weights(query, key, mask, scaling), dropout) @ value
    else:
        output = _CpuAttention.apply(query, key, value, mask, scaling)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2), None  # [B, N, T, D] -> [B, T, N, D]


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand in for Transformers' mask: ours spans prompt and tokens and is made once a batch."""
    return


def register_attention() -> None:
    """Make the attention known to Transformers under `ATTENTION_NAME`; harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, prompted_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
