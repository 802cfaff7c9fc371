"""The limit: the matrix products that an all-layer step cannot do without, at the machine's rate.

Letters: B rows, T tokens, P prompt length, L layers, H hidden size, I feed-forward size,
S = P + T keys.

The backbone is frozen, so a linear layer has one product forward and one backward, for the
gradient with respect to its input; an attention product has two backward. Below the first prompt
nothing asks for a gradient: layer 0 needs none for its input, and its keys and values only at the
prompt's positions. Everything but matrix products counts as free.
"""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from benchmarks.lengths import Sentences
from benchmarks.measure import PROMPT_LENGTH
from ptv2_core.model.backbones.packing import PackedLinear, can_pack

Shapes = Sequence[tuple[int, int]]
"""B and T of each batch."""


def bucket_shapes(sentences: Sentences) -> Shapes:
    """Return the shapes of the batches, each padded to its longest row."""
    lengths = sentences.lengths
    return [(len(rows), int(lengths[rows].max())) for rows in sentences.grouped()]


def row_shapes(sentences: Sentences) -> Shapes:
    """Return each row as a batch of its own: the same products without any padding."""
    return [(1, int(length)) for length in sentences.lengths]


def step_flop(config: PreTrainedConfig, shapes: Shapes, *, first_token: bool) -> int:
    """Return the floating-point operations of all matrix products, forward and backward.

    Args:
        config: Of a BERT.
        shapes: Of the batches.
        first_token: Whether the last layer computes the query and what follows it for the first
            token only, as a head that reads [CLS] allows.
    """
    return sum(
        _layer_flop(
            config,
            rows,
            tokens,
            queries=1 if first_token and layer == config.num_hidden_layers - 1 else tokens,
            is_first=layer == 0,
        )
        for rows, tokens in shapes
        for layer in range(config.num_hidden_layers)
    )


def _layer_flop(
    config: PreTrainedConfig, rows: int, tokens: int, *, queries: int, is_first: bool
) -> int:
    """Return one layer's operations for B rows of T tokens, of which `queries` go on."""
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    keys = PROMPT_LENGTH + tokens
    query = 2 * rows * queries * hidden * hidden
    keys_and_values = 2 * (2 * rows * tokens * hidden * hidden)
    after = 2 * rows * queries * (hidden * hidden + 2 * hidden * inner)
    # scores, and weights times values; the heads together are as wide as H
    product = 2 * rows * queries * keys * hidden
    forward = query + keys_and_values + after + 2 * product
    if is_first:
        at_prompt = 2 * rows * queries * PROMPT_LENGTH * hidden
        # through the feed-forward layers to the weights, then to the prompt's keys and values
        return forward + after + product + 2 * at_prompt
    return forward + query + keys_and_values + after + 4 * product


def gemm_rate(config: PreTrainedConfig, shapes: Shapes, *, repeats: int = 5) -> float:
    """Return the best rate of a linear layer's product here, in operations a second.

    Args:
        config: Its H and I are the sizes that are tried, in bf16, plain and packed, and in fp32.
        shapes: The rows of the product are the tokens of a batch.
        repeats: Of each size; the best counts.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    tokens = max(rows * length for rows, length in shapes)
    best = 0.0
    for dtype, is_packed in ((torch.bfloat16, can_pack()), (torch.float32, False)):
        for inputs, outputs in ((hidden, hidden), (hidden, inner), (inner, hidden)):
            states = torch.randn(tokens, inputs, dtype=dtype)
            plain = torch.nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
            layers = [plain, PackedLinear(plain)] if is_packed else [plain]
            for layer in layers * repeats:
                started = time.perf_counter()
                layer(states)
                seconds = time.perf_counter() - started
                best = max(best, 2 * tokens * inputs * outputs / seconds)
    return best
