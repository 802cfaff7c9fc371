"""DistilBERT: BERT's layers without token types and without a pooler.

Letters: B rows, T tokens, P prompt length, H hidden size.
"""

from typing import Any

from torch import Tensor

from ptv2_core.model.attention import EVERYTHING, PromptBatch
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs


class DistilBert(PlainLayers):
    """How a frozen DistilBERT is run."""

    def __init__(self, model: Any) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._model = model
        self._layers = self._model.transformer.layer
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
        hidden: Tensor = self._model.embeddings(
            input_ids=None, inputs_embeds=words, position_ids=positions
        )
        return hidden

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest."""
        output: Tensor = self._layers[index](hidden, prompts=prompts.at(index))
        return output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., H]` for `[...]`."""
        found: Tensor = self._model.embeddings.word_embeddings(input_ids)
        return found
