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
class PromptBatch:
    """The prompts of one batch, for every layer.

    Attributes:
        layers: Each layer's keys and values; None where no row has a prompt.
        masks: For each layer `[B, 1, 1, S]`, 0 where a key is seen and minus infinity where not;
            None: all are seen.
        captured: Where given, every layer appends its own tokens' keys and values to it.
    """

    layers: Sequence[LayerPrompt | None]
    masks: Sequence[Tensor | None]
    captured: list[tuple[Tensor, Tensor]] | None = field(default=None)

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerPrompt | None],
        token_mask: Tensor,
        captured: list[tuple[Tensor, Tensor]] | None = None,
    ) -> "PromptBatch":
        """Make the masks of each layer, one for layers that are alike.

        Args:
            layers: As above.
            token_mask: `[B, T]`, true at real tokens.
            captured: As above.
        """
        made: dict[tuple[int, int], Tensor | None] = {}
        masks = []
        for layer in layers:
            length = 0 if layer is None else layer.keys.shape[2]
            own = None if layer is None else layer.mask
            alike = (length, id(own))
            if alike not in made:
                made[alike] = additive_mask(token_mask, own, length)
            masks.append(made[alike])
        return cls(layers=layers, masks=masks, captured=captured)


def additive_mask(
    token_mask: Tensor, prompt_mask: Tensor | None, prompt_length: int
) -> Tensor | None:
    """Return the mask `[B, 1, 1, S]` over prompt and token keys, or None where all are seen.

    Args:
        token_mask: `[B, T]`, true at real tokens.
        prompt_mask: `[B, P]`, true at positions of the row's own prompt; None: all are.
        prompt_length: P.
    """
    if bool(token_mask.all()) and (prompt_mask is None or bool(prompt_mask.all())):
        return None
    if prompt_mask is None:
        prompt_mask = token_mask.new_ones(token_mask.shape[0], prompt_length)
    seen = torch.cat([prompt_mask, token_mask], dim=1)  # [B, S]
    mask = torch.zeros(seen.shape, dtype=torch.float32, device=seen.device)
    return mask.masked_fill(~seen, float("-inf"))[:, None, None, :]


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
    if prompts.captured is not None:
        prompts.captured.append((key.detach(), value.detach()))
    place = int(module.layer_idx)  # type: ignore[arg-type]
    prompt, mask = prompts.layers[place], prompts.masks[place]
    if prompt is not None:
        rows = query.shape[0]
        key = torch.cat([prompt.keys.expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([prompt.values.expand(rows, -1, -1, -1), value], dim=2)
    if query.device.type == "cpu":
        # torch's bf16 SDPA on CPU is 2 to 5 times slower than two products and a softmax
        scores = (query * scaling) @ key.transpose(2, 3)  # [B, N, T, S]
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        output = nn.functional.dropout(weights, dropout, training=dropout > 0.0) @ value
    else:
        bias = None if mask is None else mask.to(query.dtype)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling
        )
    return output.transpose(1, 2), None  # [B, N, T, D] -> [B, T, N, D]


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand in for Transformers' mask: ours spans prompt and tokens and is made once a batch."""
    return


def register_attention() -> None:
    """Make the attention known to Transformers under `ATTENTION_NAME`; harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, prompted_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
