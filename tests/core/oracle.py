"""An independent reading of deep-prompt attention: every layer written out, per architecture.

Shares no code with the core: it takes a Transformers model's weights and computes BERT's forward
with explicit loops over rows and heads, the prompt's keys and values put before the tokens' own.
"""

import math

import torch
from torch import Tensor, nn


def encode_row(
    model: nn.Module,
    input_ids: list[int],
    prompt: Tensor | None,
    *,
    first_position: int,
    shift: bool,
) -> Tensor:
    """Return the last hidden states `[T, H]` of one unpadded row.

    Args:
        model: A Transformers encoder of the BERT family.
        input_ids: The row.
        prompt: `[L, 2, N, P, D]`, or None for the bare backbone.
        first_position: 0, or the padding id plus one in the RoBERTa family.
        shift: Whether positions start after the prompt.
    """
    length = prompt.shape[3] if prompt is not None else 0
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
    for place, layer in enumerate(model.encoder.layer):
        hidden = _layer(hidden, layer, None if prompt is None else prompt[place])
    return hidden


def _layer(hidden: Tensor, layer: nn.Module, prompt: Tensor | None) -> Tensor:
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


def _linear(states: Tensor, layer: nn.Module) -> Tensor:
    return states @ layer.weight.T + layer.bias


def _norm(states: Tensor, layer: nn.Module) -> Tensor:
    mean = states.mean(dim=-1, keepdim=True)
    variance = ((states - mean) ** 2).mean(dim=-1, keepdim=True)
    return (states - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias
