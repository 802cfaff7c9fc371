"""Attention over prompts and tokens, behind Transformers' attention interface.

Letters: B rows, T tokens, P prompt length, L layers, N key/value heads, G query heads for each of
them, D head size, S = P + T keys.

The prompts of a batch travel as one keyword argument of the backbone's forward and arrive here
with every layer's call, so nothing is kept on a module between two calls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ptv2_core.model.prompts import LayerPrompt

ATTENTION_NAME = "ptv2"
# keys that torch's softmax takes at once in bf16 on a CPU; it takes what is left one by one, which
# costs more than a detour over fp32 unless there are many
BF16_BLOCK = 32
RAGGED_KEYS = 128


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What one layer computed of a batch's tokens, without gradients.

    Attributes:
        layer: Which; 0 is the lowest.
        query: `[B, G * N, T, D]`; query head h asks key head `h // G`.
        key: `[B, N, T, D]`.
        value: `[B, N, T, D]`.
        scaling: The layer's factor on the scores.
        bias: Added to the scores of tokens, `[B or 1, N or 1, T or 1, T]`: minus infinity where one
            is not seen, and what an architecture adds for places; None: nothing.
        context: `[B, T, G * N, D]`, what attention gave; None where nobody asked.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    bias: Tensor | None = None
    context: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which tokens a token sees in one layer. A deep prompt is always seen.

    Attributes:
        is_causal: None that stands after it.
        window: None that is further away; None: however far.
    """

    is_causal: bool = False
    window: int | None = None


EVERYTHING = Sight()


@dataclass(frozen=True, kw_only=True)
class LayerBatch:
    """What one layer's attention is told of a batch's prompts.

    Attributes:
        layer: Which; 0 is the lowest. Where layers share weights, no module knows.
        prompt: Its keys and values; None where no row has a prompt.
        mask: `[B, 1, 1, S]` or `[B or 1, 1, T, S]`, as in `PromptBatch`.
        captured: As in `PromptBatch`.
    """

    layer: int
    prompt: LayerPrompt | None
    mask: Tensor | None
    captured: list[Captured] | None = field(default=None)


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """The prompts of one batch, for every layer.

    Attributes:
        layers: Each layer's keys and values; None where no row has a prompt.
        masks: For each layer `[B, 1, 1, S]`, or `[B or 1, 1, T, S]` where tokens see different
            tokens: 0 where a key is seen and minus infinity where not; None: all are seen.
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
            length = 0 if layer is None else layer.length
            own = None if layer is None else layer.mask
            alike = (length, id(own))
            if alike not in made:
                made[alike] = additive_mask(token_mask, own, length, dtype)
            masks.append(made[alike])
        return cls(layers=layers, masks=masks, captured=captured)

    def at(self, layer: int) -> LayerBatch:
        """Return what one layer is told; 0 is the lowest."""
        return LayerBatch(
            layer=layer,
            prompt=self.layers[layer],
            mask=self.masks[layer],
            captured=self.captured,
        )

    def limited(
        self, sights: Sequence[Sight], num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> "PromptBatch":
        """Return the same with masks that let tokens see what each layer lets them see.

        Args:
            sights: One for each layer.
            num_tokens: T.
            dtype: Of the states.
            device: Where they are.
        """
        if all(sight == EVERYTHING for sight in sights):
            return self
        made: dict[tuple[int, int, Sight], Tensor | None] = {}
        masks = []
        for layer, mask, sight in zip(self.layers, self.masks, sights, strict=True):
            length = 0 if layer is None else layer.length
            alike = (length, id(mask), sight)
            if alike not in made:
                made[alike] = mask
                if sight != EVERYTHING:
                    made[alike] = _limited_mask(mask, sight, length, num_tokens, dtype, device)
            masks.append(made[alike])
        return replace(self, masks=masks)


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


def _limited_mask(
    mask: Tensor | None,
    sight: Sight,
    prompt_length: int,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the mask `[B or 1, 1, T, S]` of a layer in which tokens see different tokens."""
    places = torch.arange(num_tokens, device=device)
    distance = places[:, None] - places[None, :]  # [T, T]: query less key
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if sight.is_causal:
        hidden |= distance < 0
    if sight.window is not None:
        hidden |= distance.abs() > sight.window
    hidden = nn.functional.pad(hidden, (prompt_length, 0))[None, None]  # [1, 1, T, S]
    if mask is not None:
        hidden = hidden | (mask == float("-inf"))
        # padding far from all real tokens would see nothing, and its softmax be no number
        hidden &= ~nn.functional.pad(distance == 0, (prompt_length, 0))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention weights `[B, N, T, S]`, in the format of the states.

    The softmax of a bf16 tensor is computed in fp32 and rounded once, inside torch or here.
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    if mask is not None:
        scores.add_(mask)
    width = scores.shape[-1]
    is_slow = scores.dtype == torch.bfloat16 and width < RAGGED_KEYS and width % BF16_BLOCK != 0
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if is_slow else None)
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
    prompts: LayerBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over the row's prompt and tokens; returns `[B, T, G * N, D]`.

    Args:
        module: The layer's attention module; nothing is read from it.
        query: `[B, G * N, T, D]`, in groups of G heads that ask the same keys.
        key: `[B, N, T, D]`.
        value: `[B, N, T, D]`.
        attention_mask: What an architecture adds to the scores of tokens, `[B or 1, G * N, T, T]`;
            mostly None: the mask over prompt and tokens is in `prompts`.
        scaling: Factor on the scores.
        dropout: Probability of dropping an attention weight; 0 unless the backbone trains.
        prompts: The layer's prompts and mask.
    """
    query, key, value = _in_one_format(query, key, value)
    own_key, own_value = key, value
    prompt, length = prompts.prompt, 0
    if prompt is not None:
        rows, length = query.shape[0], prompt.length
        keys, values = prompt.keys_and_values()
        key = torch.cat([keys.expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([values.expand(rows, -1, -1, -1), value], dim=2)
    mask = _added(prompts.mask, attention_mask, length, query.dtype)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    if query.device.type != "cpu":
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    elif dropout > 0.0 or (mask is not None and mask.requires_grad):
        output = nn.functional.dropout(_weights(query, key, mask, scaling), dropout) @ value
    else:
        output = _CpuAttention.apply(query, key, value, mask, scaling)  # type: ignore[no-untyped-call]
    output = output.transpose(1, 2)  # [B, G * N, T, D] -> [B, T, G * N, D]
    if prompts.captured is not None:
        prompts.captured.append(
            Captured(
                layer=prompts.layer,
                query=query.detach(),
                key=own_key.detach(),
                value=own_value.detach(),
                scaling=scaling,
                bias=None if mask is None else mask[..., length:].detach(),
                context=output.detach(),
            )
        )
    return output, None


def _in_one_format(*states: Tensor) -> Iterator[Tensor]:
    """Yield states in the format of their products, which autocast alone may change.

    Tables of places are in fp32, and so is a query that was turned by them. A backward pass, which
    is outside of autocast, would then multiply what it kept of two formats.
    """
    device = states[0].device.type
    is_mixed = torch.is_autocast_enabled(device)
    for one in states:
        yield one.to(torch.get_autocast_dtype(device)) if is_mixed else one


def _added(
    mask: Tensor | None, bias: Tensor | None, prompt_length: int, dtype: torch.dtype
) -> Tensor | None:
    """Return mask and bias as one; a prompt has no place, and so nothing is added for it."""
    if bias is None:
        return mask
    whole = nn.functional.pad(bias.to(dtype), (prompt_length, 0))  # [.., T, T] -> [.., T, S]
    return whole if mask is None else whole + mask


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand in for Transformers' mask: ours spans prompt and tokens and is made once a batch."""
    return


def register_attention() -> None:
    """Make the attention known to Transformers under `ATTENTION_NAME`; harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, prompted_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
