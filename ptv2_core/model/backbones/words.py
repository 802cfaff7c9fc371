"""A prompt of word embeddings before those of the tokens.

Letters: B rows, T tokens, P prompt length, E width of embeddings.
"""

import torch
from torch import Tensor, nn


def after_inputs(words: Tensor, inputs: Tensor | None) -> Tensor:
    """Return `[B, T, E]`, or `[B, P + T, E]` with `inputs` `[P, E]` before each row."""
    if inputs is None:
        return words
    return torch.cat([inputs.to(words.dtype).expand(len(words), -1, -1), words], dim=1)


def types_after_inputs(types: Tensor | None, inputs: Tensor | None) -> Tensor | None:
    """Return `[B, T]`, or `[B, P + T]` where inputs are of type 0; None where there is none."""
    if types is None or inputs is None:
        return types
    return nn.functional.pad(types, (len(inputs), 0))
