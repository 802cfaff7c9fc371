"""MPNet: attention of its own, which adds to each score a number for the tokens' distance.

A prompt has no place: its keys get no such number. The attention is run here, on the layer's own
weights, because Transformers' is written for tokens alone.

Letters: B rows, T tokens, P prompt length, H hidden size, N heads, D head size.
"""

from typing import Any

from torch import Tensor

from ptv2_core.model.attention import EVERYTHING, PromptBatch, prompted_attention
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs


class MPNet(PlainLayers):
    """How a frozen MPNet is run."""

    def __init__(self, model: Any) -> None:
        """Run `model`."""
        self._model = model
        self._layers = self._model.encoder.layer
        self.sights = [EVERYTHING] * len(self._layers)

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, H]`."""
        words = after_inputs(self.word_embeddings(input_ids), inputs)
        hidden: Tensor = self._model.embeddings(inputs_embeds=words, position_ids=positions)
        return hidden

    def share(self, hidden: Tensor, positions: Tensor, token_mask: Tensor) -> Shared:
        """Return the number for each distance, `[1, N, T, T]`, the same in all layers."""
        return {"bias": self._model.encoder.compute_position_bias(hidden[:1])}

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest."""
        layer = self._layers[index]
        around, own = layer.attention, layer.attention.attn
        shape = (*hidden.shape[:-1], -1, own.attention_head_size)
        query, key, value = (
            part(hidden).view(shape).transpose(1, 2)  # [B, T, H] -> [B, N, T, D]
            for part in (own.q, own.k, own.v)
        )
        context, _ = prompted_attention(
            own,
            query,
            key,
            value,
            shared["bias"],
            scaling=own.attention_head_size**-0.5,
            dropout=own.dropout.p if own.training else 0.0,
            prompts=prompts.at(index),
        )
        attended = own.o(context.flatten(2))  # [B, T, N, D] -> [B, T, H]
        attended = around.LayerNorm(around.dropout(attended) + hidden)
        output: Tensor = layer.output(layer.intermediate(attended), attended)
        return output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., H]` for `[...]`."""
        found: Tensor = self._model.embeddings.word_embeddings(input_ids)
        return found

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Return the backbone's own pooled states `[B, H]`, where it has a pooler."""
        pooler = self._model.pooler
        return None if pooler is None else pooler(hidden)
