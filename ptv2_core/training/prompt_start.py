"""What a deep prompt is before its first step: where its keys and values come from, how loud it is.

A prompt that begins with much of the tokens' attention hides them from each other: 64 keys drawn at
random begin with half of it, and pairs of texts, which are compared by tokens that look at each
other, are then not learned at all (docs/optimisation.md). So a prompt begins quiet: the queries of
a head have a large part in common, and keys that are moved against it all lose score alike. What
results is an ordinary prompt, saved and served like any other.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ptv2_core.config import TrainConfig
from ptv2_core.data.batching import Batch, collate
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.model.attention import Captured, PromptBatch
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompts import EmbeddingPrompt, MlpPrompt, make_prompt

# rows whose words a prompt is sampled from and held against
START_ROWS = 64
# queries of a row that are asked at most: scores grow with queries times tokens
MAX_QUERIES = 256
# of the mean square of the queries, added to each of their directions
RIDGE = 1e-4


def new_deep_prompt(
    backbone: Backbone, config: TrainConfig, train: EncodedSplit
) -> EmbeddingPrompt | MlpPrompt:
    """Return a prompt of keys and values, as `config.prompt` says that it starts.

    Args:
        backbone: Has the shape; its own states for training rows are looked at where needed.
        config: Prompt and seed.
        train: Has the rows.

    Raises:
        ConfigError: A layer is named that the backbone does not have.
    """
    shape, wanted = backbone.spec.shape, config.prompt
    layers = wanted.layer_indices(shape.num_layers)
    samples = wanted.start == "backbone" and wanted.reparameterization != "mlp"
    if not samples and wanted.start_attention is None:
        return make_prompt(shape, wanted, seed=config.seed)
    batch = _start_rows(backbone, config, train)
    shift = wanted.length if wanted.shift_positions and layers[0] == 0 else 0
    states = _bare_states(backbone, batch, shift)
    start = None
    if samples:
        start = sample_keys_and_values(
            states, batch.token_mask, count=wanted.length, seed=config.seed
        )
    prompt = make_prompt(shape, wanted, seed=config.seed, start=start)
    if wanted.start_attention is not None:
        with torch.no_grad():
            keys = prompt()[:, 0]
            shifts = [
                quieting_shift(own, states[layer], batch.token_mask, share=wanted.start_attention)
                for layer, own in zip(layers, keys, strict=True)
            ]
            prompt.shift_keys(torch.stack(shifts))
    return prompt


def sample_keys_and_values(
    states: Sequence[Captured], token_mask: Tensor, *, count: int, seed: int
) -> Tensor:
    """Return a backbone's own keys and values of `count` sampled tokens, `[L, 2, N, count, D]`.

    Args:
        states: Of each layer, without a prompt.
        token_mask: `[B, T]`, true at real tokens, of which there is at least one.
        count: P, how many tokens to sample; with replacement where there are fewer.
        seed: Of the sample.
    """
    places = token_mask.nonzero().cpu()  # [tokens, 2]: row and position
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator)
    if len(order) < count:
        order = order.repeat(-(-count // len(order)))
    rows, positions = places[order[:count]].unbind(dim=1)
    layers = [
        torch.stack([pair[rows, :, positions].transpose(0, 1) for pair in (one.key, one.value)])
        for one in states  # keys and values are [B, N, T, D]
    ]
    return torch.stack(layers).float().cpu()


def quieting_shift(keys: Tensor, layer: Captured, token_mask: Tensor, *, share: float) -> Tensor:
    """Return what to add to all of a layer's prompt keys so that tokens give them little attention.

    In each head it is the shift whose product with the tokens' queries is nearest, in least
    squares, to the number that brings the mean log-odds of prompt against tokens to those of
    `share`. Heads of queries that ask the same keys are brought there together. Where a head's
    queries have no part in common, nothing can, and the shift is small.

    Args:
        keys: `[N, P, D]`, the prompt's.
        layer: The layer's states of the tokens, without a prompt.
        token_mask: `[B, T]`, true at real tokens.
        share: Of the attention, above 0 and below 1.

    Returns:
        `[N, D]`, fp32, on the CPU.
    """
    queries, own = _asked(layer, token_mask)  # [Q, G, N, D], [Q, G, N]
    scores = torch.einsum("qgnd,npd->qgnp", queries, keys.to(queries)) * layer.scaling
    odds = (scores.logsumexp(-1) - own).mean(0)  # [G, N]
    wanted = (math.log(share / (1 - share)) - odds) / layer.scaling
    size = queries.shape[-1]
    moments = torch.einsum("qgnd,qgne->nde", queries, queries) / len(queries)
    ridge = RIDGE * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    moments += ridge * torch.eye(size, dtype=moments.dtype)
    common = (wanted[:, :, None] * queries.mean(0)).sum(0)  # [N, D]
    shift: Tensor = torch.linalg.solve(moments, common)
    return shift.float()


def _start_rows(backbone: Backbone, config: TrainConfig, train: EncodedSplit) -> Batch:
    """Return rows of train: START_ROWS, or as many as a step's budget of padded tokens holds."""
    chosen = np.random.default_rng(config.seed).permutation(len(train))[:START_ROWS]
    longest = np.maximum.accumulate(train.lengths[chosen])
    fits = longest * np.arange(1, len(chosen) + 1) <= config.token_budget
    fits[0] = True
    return collate(train, np.sort(chosen[: int(fits.sum())])).to(backbone.device)


@torch.no_grad()
def _bare_states(backbone: Backbone, batch: Batch, shift: int) -> list[Captured]:
    """Return what each layer computes of tokens at the positions that the prompt leaves them."""
    captured: list[Captured] = []
    dtype = backbone.states_dtype
    none = [None] * backbone.spec.shape.num_layers
    backbone.encode(
        batch.input_ids,
        batch.token_mask,
        batch.token_type_ids,
        shifts=torch.tensor([shift], device=backbone.device),
        prompts=PromptBatch.of(none, batch.token_mask, dtype, captured),
    )
    return sorted(captured, key=lambda one: one.layer)


def _asked(layer: Captured, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries `[Q, G, N, D]` of real tokens, and the log-sums `[Q, G, N]` of their scores.

    Of a longer row every so many-th token is asked. Both are fp64 and on the CPU.
    """
    queries, sums = [], []
    rows, groups = len(token_mask), layer.query.shape[1] // layer.key.shape[1]
    for row, real in enumerate(token_mask):
        keys = layer.key[row][:, real].double().cpu()  # [N, T, D]
        stride = -(-keys.shape[1] // MAX_QUERIES)
        asked = layer.query[row][:, real][:, ::stride].double().cpu()
        asked = asked.view(-1, groups, *asked.shape[1:])  # [N, G, Q, D]
        scores = asked @ keys[:, None].transpose(-1, -2) * layer.scaling  # [N, G, Q, T]
        if layer.bias is not None:
            bias = layer.bias.expand(rows, -1, -1, -1)[row]  # [G * N or 1, T or 1, T]
            bias = bias.expand(-1, len(real), -1)[:, real][:, ::stride][..., real]
            bias = bias.double().cpu()
            scores = scores + (bias if len(bias) == 1 else bias.view_as(scores))
        queries.append(asked.permute(2, 1, 0, 3))
        sums.append(scores.logsumexp(-1).permute(2, 1, 0))
    return torch.cat(queries), torch.cat(sums)
