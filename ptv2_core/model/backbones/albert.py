"""ALBERT: layers that share their weights, and embeddings narrower than the states.

Each application of a layer has a prompt of its own, though its weights are those of others.

Letters: B rows, T tokens, P prompt length, H hidden size, E width of embeddings.
"""

from typing import Any

from torch import Tensor

from ptv2_core.model.attention import EVERYTHING, PromptBatch
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs, types_after_inputs


class Albert(PlainLayers):
    """How a frozen ALBERT is run."""

    def __init__(self, model: Any) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._model = model
        config = self._model.config
        self._layers = [
            layer
            for index in range(config.num_hidden_layers)
            for layer in self._group(index, config).albert_layers
        ]
        self.sights = [EVERYTHING] * len(self._layers)

    def _group(self, index: int, config: Any) -> Any:
        # as many applications in a row for each group
        each = config.num_hidden_layers / config.num_hidden_groups
        return self._model.encoder.albert_layer_groups[int(index / each)]

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, E]`."""
        words = after_inputs(self.word_embeddings(input_ids), inputs)
        types = types_after_inputs(token_type_ids, inputs)
        embedded = self._model.embeddings(
            inputs_embeds=words, token_type_ids=types, position_ids=positions
        )
        hidden: Tensor = self._model.encoder.embedding_hidden_mapping_in(embedded)
        return hidden

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Apply one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest."""
        output: Tensor = self._layers[index](hidden, prompts=prompts.at(index))
        return output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., E]` for `[...]`."""
        found: Tensor = self._model.embeddings.word_embeddings(input_ids)
        return found

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Return the backbone's own pooled states `[B, H]`, where it has a pooler."""
        pooler = self._model.pooler
        return None if pooler is None else self._model.pooler_activation(pooler(hidden[:, 0]))
