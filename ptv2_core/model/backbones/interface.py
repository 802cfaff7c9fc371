"""BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA: prompts through Transformers' attention interface.

The layers are run one by one, so that a forward can begin above the ones below the first prompt,
and the last layer can compute what the head reads and nothing else.

Letters: B rows, T tokens, H hidden size, N heads, D head size.
"""

from typing import Any

from torch import Tensor

from ptv2_core.model.attention import EVERYTHING, PromptBatch, prompted_attention
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs, types_after_inputs


class BertFamily(PlainLayers):
    """How the frozen model of the BERT family is run."""

    def __init__(self, model: Any) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._model = model
        self.sights = [EVERYTHING] * len(self._model.encoder.layer)

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`, or `[B, P + T, H]` with `inputs`.

        Args:
            input_ids: `[B, T]`.
            token_type_ids: `[B, T]` or None.
            positions: `[B or 1, T]`, or `[B or 1, P + T]`.
            inputs: `[P, H]`, word embeddings that stand before those of the tokens.
        """
        model = self._model
        hidden: Tensor = model.embeddings(
            inputs_embeds=after_inputs(self.word_embeddings(input_ids), inputs),
            token_type_ids=types_after_inputs(token_type_ids, inputs),
            position_ids=positions,
        )
        if hasattr(model, "embeddings_project"):
            hidden = model.embeddings_project(hidden)
        return hidden

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest."""
        output: Tensor = self._model.encoder.layer[index](hidden, prompts=prompts.at(index))
        return output

    def first_token_layer(
        self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared
    ) -> Tensor:
        """Run one layer for the first token alone, `[B, T, H]` to `[B, 1, H]`.

        It attends to all tokens, but no other token's query, output or feed-forward is computed.
        """
        layer = self._model.encoder.layer[index]
        own = layer.attention.self

        def by_head(states: Tensor) -> Tensor:
            rows, tokens, _ = states.shape
            return states.view(rows, tokens, -1, own.attention_head_size).transpose(1, 2)

        first = hidden[:, :1]
        context, _ = prompted_attention(
            own,
            by_head(own.query(first)),  # [B, N, 1, D]
            by_head(own.key(hidden)),
            by_head(own.value(hidden)),
            None,
            scaling=own.scaling,
            dropout=own.dropout.p if own.training else 0.0,
            prompts=prompts.at(index),
        )
        attended = layer.attention.output(context.flatten(2), first)  # [B, 1, N, D] -> [B, 1, H]
        output: Tensor = layer.feed_forward_chunk(attended)
        return output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., H]` for `[...]`."""
        found: Tensor = self._model.embeddings.word_embeddings(input_ids)
        return found

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Return the backbone's own pooled states `[B, H]`, where it has a pooler."""
        pooler = getattr(self._model, "pooler", None)
        return None if pooler is None else pooler(hidden)
