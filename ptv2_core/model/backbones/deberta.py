"""DeBERTa and DeBERTa-v2/v3: attention in three terms, of contents and of relative places.

A prompt takes part in the term of contents alone. Its keys have no place, so the terms between
contents and places say nothing of them; its scores are scaled as those of tokens are. The attention
is run here, on the layer's own weights and its own terms of places.

Letters: B rows, T tokens, P prompt length, H hidden size, N heads, D head size.
"""

from typing import Any

from torch import Tensor

from ptv2_core.errors import BackboneError
from ptv2_core.model.attention import EVERYTHING, PromptBatch, prompted_attention
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs, types_after_inputs


class Deberta(PlainLayers):
    """How a frozen DeBERTa of either version is run."""

    def __init__(self, model: Any, *, is_first: bool) -> None:
        """Run `model`.

        Args:
            model: The Transformers model.
            is_first: Whether it is of the first version, which has one product for queries, keys
                and values.

        Raises:
            BackboneError: Its heads are mixed before the softmax.
        """
        self._model = model
        self._encoder = self._model.encoder
        self._layers = self._encoder.layer
        self._is_first = is_first
        self.sights = [EVERYTHING] * len(self._layers)
        if getattr(self._model.config, "talking_head", False):
            raise BackboneError(
                "backbone.name: a DeBERTa whose heads are mixed before the softmax (talking_head) "
                "takes no deep prompts here; expected one without"
            )

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs`."""
        words = after_inputs(self.word_embeddings(input_ids), inputs)
        types = types_after_inputs(token_type_ids, inputs)
        hidden: Tensor = self._model.embeddings(
            inputs_embeds=words, token_type_ids=types, position_ids=positions
        )
        return hidden

    def share(self, hidden: Tensor, positions: Tensor, token_mask: Tensor) -> Shared:
        """Return the relative places of all pairs of tokens, and what stands for them."""
        return {
            "places": self._encoder.get_rel_pos(hidden),
            "embeddings": self._encoder.get_rel_embedding(),
            "token_mask": token_mask,
        }

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest."""
        layer = self._layers[index]
        own = layer.attention.self
        query, key, value = self._projected(own, hidden)
        # each term of places that there is makes all smaller
        terms = 1 + sum(term in own.pos_att_type for term in ("c2p", "p2c"))
        scaling = (query.shape[-1] * terms) ** -0.5
        context, _ = prompted_attention(
            own,
            query,
            key,
            value,
            self._places(own, query, key, terms, scaling, shared),
            scaling=scaling,
            dropout=own.dropout.p if own.training else 0.0,
            prompts=prompts.at(index),
        )
        attended = layer.attention.output(context.flatten(2), hidden)  # [B, T, N, D] -> [B, T, H]
        output: Tensor = layer.output(layer.intermediate(attended), attended)
        convolution = getattr(self._encoder, "conv", None)
        if index == 0 and convolution is not None:
            mask = shared["token_mask"]
            # a token beside padding is as one at the end of a row
            output = convolution(
                hidden * mask[:, :, None], residual_states=output, input_mask=mask.long()
            )
        return output

    def _projected(self, own: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each `[B, N, T, D]`."""
        shape = (*hidden.shape[:-1], own.num_attention_heads, -1)
        if not self._is_first:
            query, key, value = (
                part(hidden).view(shape).transpose(1, 2)  # [B, T, H] -> [B, N, T, D]
                for part in (own.query_proj, own.key_proj, own.value_proj)
            )
            return query, key, value
        whole = own.in_proj(hidden).view(shape).transpose(1, 2)  # [B, N, T, 3 * D]
        query, key, value = whole.chunk(3, dim=-1)
        size = (1, own.num_attention_heads, 1, -1)
        return query + own.q_bias.view(size), key, value + own.v_bias.view(size)

    def _places(
        self, own: Any, query: Tensor, key: Tensor, terms: int, scaling: float, shared: Shared
    ) -> Tensor | None:
        """Return the terms of relative places `[B, N, T, T]`, as the layer itself computes them."""
        if not own.relative_attention or terms == 1:
            return None
        given = {
            "relative_pos": shared["places"],
            "rel_embeddings": own.pos_dropout(shared["embeddings"]),
            "scale_factor": terms,
        }
        if self._is_first:
            scores: Tensor = own.disentangled_att_bias(query * scaling, key, **given)
            return scores
        flat: Tensor = own.disentangled_attention_bias(
            query.flatten(0, 1), key.flatten(0, 1), **given
        )
        return flat.view(*query.shape[:-1], -1)  # [B * N, T, T] -> [B, N, T, T]

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, as wide as the words."""
        found: Tensor = self._model.embeddings.word_embeddings(input_ids)
        return found


def deberta(model: Any) -> Deberta:
    """Run a DeBERTa of the first version."""
    return Deberta(model, is_first=True)


def deberta_v2(model: Any) -> Deberta:
    """Run a DeBERTa of the second or third version."""
    return Deberta(model, is_first=False)
