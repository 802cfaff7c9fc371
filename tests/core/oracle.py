"""An independent reading of deep-prompt attention: every layer written out, per architecture.

Shares no code with the core: it takes a Transformers model's weights and computes BERT's forward
with explicit loops over rows and heads, the prompt's keys and values put before the tokens' own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_row(
    model: Any,
    input_ids: list[int],
    prompt: Tensor | Sequence[Tensor | None] | None,
    *,
    first_position: int,
    shift: bool,
) -> Tensor:
    """Return the last hidden states `[T, H]` of one unpadded row.

    Args:
        model: A Transformers encoder of the BERT family.
        input_ids: The row.
        prompt: `[L, 2, N, P, D]`, or for each layer `[2, N, P, D]` or None where it has none, or
            None for the bare backbone.
        first_position: 0, or the padding id plus one in the RoBERTa family.
        shift: Whether positions start after the prompt.
    """
    by_layer = list(prompt) if prompt is not None else [None] * len(model.encoder.layer)
    length = max((one.shape[2] for one in by_layer if one is not None), default=0)
    embeddings = model.embeddings
    tokens = torch.tensor(input_ids)
    positions = torch.arange(len(input_ids)) + first_position + (length if shift else 0)
    hidden = (
        embeddings.word_embeddings.weight[tokens]
        + embeddings.token_type_embeddings.weight[0]
        + embeddings.position_embeddings.weight[positions]
    )
    hidden = _norm(hidden, embeddings.LayerNorm)
    if hasattr(model, "embeddings_project"):
        hidden = _linear(hidden, model.embeddings_project)
    for layer, own in zip(model.encoder.layer, by_layer, strict=True):
        hidden = _layer(hidden, layer, own)
    return hidden


def _layer(hidden: Tensor, layer: Any, prompt: Tensor | None) -> Tensor:
    attention = layer.attention.self
    heads, size = attention.num_attention_heads, attention.attention_head_size
    query, key, value = (
        _linear(hidden, part) for part in (attention.query, attention.key, attention.value)
    )
    context = torch.zeros_like(hidden)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        keys, values = key[:, columns], value[:, columns]
        if prompt is not None:
            keys = torch.cat([prompt[0, head], keys])
            values = torch.cat([prompt[1, head], values])
        for token in range(len(hidden)):
            scores = torch.stack([query[token, columns] @ k for k in keys]) / math.sqrt(size)
            shares = torch.exp(scores - scores.max())
            context[token, columns] = (shares / shares.sum()) @ values
    output = layer.attention.output
    attended = _norm(_linear(context, output.dense) + hidden, output.LayerNorm)
    inner = _linear(attended, layer.intermediate.dense)
    inner = 0.5 * inner * (1.0 + torch.erf(inner / math.sqrt(2.0)))
    return _norm(_linear(inner, layer.output.dense) + attended, layer.output.LayerNorm)


def _linear(states: Tensor, layer: Any) -> Tensor:
    output: Tensor = states @ layer.weight.T + layer.bias
    return output


def _norm(states: Tensor, layer: Any) -> Tensor:
    mean = states.mean(dim=-1, keepdim=True)
    variance = ((states - mean) ** 2).mean(dim=-1, keepdim=True)
    scaled: Tensor = (states - mean) / torch.sqrt(variance + layer.eps) * layer.weight
    output: Tensor = scaled + layer.bias
    return output
