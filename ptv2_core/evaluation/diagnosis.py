"""What a deep prompt does in each layer: the attention it gets, its size and its rank.

Letters: B rows, T tokens, P prompt length, N key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptv2_core.data.batching import Batch, collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.model.attention import Captured
from ptv2_core.model.heads import LinearHead, reads_first_token
from ptv2_core.model.prompted import PromptedModel

DIAGNOSED_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What the prompt of one layer is, and what the layer makes of it.

    Attributes:
        layer: Which; 0 is the lowest.
        attention: Share of the attention that tokens give to the prompt, mean over heads.
        head_attention: The same for each head.
        key_norm: Root mean square of the prompt's keys.
        value_norm: Of its values.
        key_rank: Effective rank of the prompt's keys, from 1 to P.
        value_rank: Of its values.
        token_key_norm: Root mean square of the layer's own keys of the tokens.
        token_value_norm: Of its own values.
    """

    layer: int
    attention: float
    head_attention: tuple[float, ...]
    key_norm: float
    value_norm: float
    key_rank: float
    value_rank: float
    token_key_norm: float
    token_value_norm: float


def root_mean_square(states: Tensor) -> float:
    """Return the root mean square of all elements."""
    return float(states.double().square().mean().sqrt())


def effective_rank(states: Tensor) -> float:
    """Return the effective rank of a layer's keys or values `[N, P, D]` (Roy & Vetterli 2007).

    It is the exponential of the entropy of the normalised singular values of the matrix of P
    positions: P where the positions have nothing in common, 1 where they are multiples of one,
    0 where all are zero.
    """
    positions = states.double().transpose(0, 1).flatten(1)  # [N, P, D] -> [P, N * D]
    sizes = torch.linalg.svdvals(positions)
    total = float(sizes.sum())
    if total == 0.0:
        return 0.0
    shares = sizes / total
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def diagnose(
    model: PromptedModel,
    split: EncodedSplit,
    *,
    slot: int = 0,
    rows: int = DIAGNOSED_ROWS,
    token_budget: int,
) -> tuple[LayerFigures, ...]:
    """Measure a slot's prompt in each of its layers; the model is left in evaluation mode.

    The attention is that of the tokens whose queries the answer depends on: all real tokens, but in
    the last layer, where the head may read one of them alone.

    Args:
        model: With prompt and head in the slot.
        split: Where the tokens are from.
        slot: Which.
        rows: How many rows, the first of the split; of rows that are answered together, all.
        token_budget: Padded tokens of a batch at most.

    Returns:
        One for each layer with a prompt, lowest first; none where the slot has no deep prompt.
    """
    layers = model.bank.layers(slot)
    if not layers:
        return ()
    model.eval()
    prompt = model.bank.flatten(slot)  # [layers, 2, N, P, D]
    found = [_Sums(pair.to(model.backbone.device)) for pair in prompt]
    lengths = split.unit_lengths[:rows]
    last = model.bank.shape.num_layers - 1
    for units in sorted_batches(lengths, batch_size=len(lengths), token_budget=token_budget):
        batch = collate(split, split.rows_of(units)).to(model.backbone.device)
        captured: list[Captured] = []
        model.encode(
            batch.input_ids, batch.token_mask, batch.token_type_ids, slots=slot, captured=captured
        )
        of_layer = {one.layer: one for one in captured}
        for layer, sums in zip(layers, found, strict=True):
            asked = batch.token_mask
            if layer == last:
                asked = _read_tokens(batch, model.heads[slot])  # type: ignore[arg-type]
            sums.add(of_layer[layer], batch.token_mask, asked)
    return tuple(
        sums.figures(layer, pair)
        for layer, sums, pair in zip(layers, found, prompt.unbind(0), strict=True)
    )


def _read_tokens(batch: Batch, head: LinearHead) -> Tensor:
    """Return `[B, T]`, true at the tokens whose last states the head reads."""
    places = torch.arange(batch.token_mask.shape[1], device=batch.token_mask.device)
    if reads_first_token(head.reads):
        return (places == 0).expand_as(batch.token_mask)
    if head.reads == "last":
        return places == batch.token_mask.sum(dim=1, keepdim=True) - 1
    if head.reads == "mask" and batch.read_at is not None:
        return places == batch.read_at[:, None]
    return batch.token_mask


class _Sums:
    """Sums over the batches, kept on the CPU in fp64."""

    def __init__(self, prompt: Tensor) -> None:
        """Begin with nothing for a layer's prompt `[2, N, P, D]`."""
        self._keys = prompt[0]
        self._shares = torch.zeros(prompt.shape[1], dtype=torch.float64)
        self._queries = 0
        self._squares = [0.0, 0.0]
        self._elements = 0

    def add(self, captured: Captured, token_mask: Tensor, asked: Tensor) -> None:
        """Count a batch, whose tokens are real at `token_mask` and ask at `asked`, `[B, T]`."""
        shares = _prompt_shares(captured, self._keys, token_mask)
        self._shares += (shares * asked[:, None]).sum(dim=(0, 2)).cpu()
        self._queries += int(asked.sum())
        for place, states in enumerate((captured.key, captured.value)):
            real = states.transpose(1, 2)[token_mask]  # [B, N, T, D] -> [tokens, N, D]
            self._squares[place] += float(real.float().square().sum())
        self._elements += int(token_mask.sum()) * captured.key.shape[1] * captured.key.shape[3]

    def figures(self, layer: int, prompt: Tensor) -> LayerFigures:
        """Return the figures of the layer with this prompt `[2, N, P, D]`."""
        keys, values = prompt.unbind(0)
        heads: Sequence[float] = (self._shares / self._queries).tolist()
        token_norms = [(total / self._elements) ** 0.5 for total in self._squares]
        return LayerFigures(
            layer=layer,
            attention=sum(heads) / len(heads),
            head_attention=tuple(heads),
            key_norm=root_mean_square(keys),
            value_norm=root_mean_square(values),
            key_rank=effective_rank(keys),
            value_rank=effective_rank(values),
            token_key_norm=token_norms[0],
            token_value_norm=token_norms[1],
        )


def _prompt_shares(captured: Captured, keys: Tensor, token_mask: Tensor) -> Tensor:
    """Return `[B, N, T]`: the share of each query's attention that goes to the prompt.

    Heads of queries that ask the same keys are one, with the mean of their shares.

    Args:
        captured: Queries and keys of the tokens.
        keys: `[N, P, D]`, of the prompt.
        token_mask: `[B, T]`, true at real tokens.
    """
    query = captured.query.float() * captured.scaling
    group = query.shape[1] // len(keys)
    own, of_prompt = (
        states.float().repeat_interleave(group, dim=-3) for states in (captured.key, keys)
    )
    by_prompt = query @ of_prompt.transpose(1, 2)  # [B, G * N, T, P]
    by_tokens = query @ own.transpose(2, 3)  # [B, G * N, T, T]
    if captured.bias is not None:
        by_tokens = by_tokens + captured.bias.float()
    by_tokens = by_tokens.masked_fill(~token_mask[:, None, None, :], float("-inf"))
    # the softmax over prompt and tokens, summed over the prompt
    shares = torch.sigmoid(by_prompt.logsumexp(dim=-1) - by_tokens.logsumexp(dim=-1))
    rows, _, tokens = shares.shape
    return shares.view(rows, -1, group, tokens).mean(dim=2)  # [B, G * N, T] -> [B, N, T]
