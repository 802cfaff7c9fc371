"""GPT-2 and OPT: decoders with a table of positions, used as encoders.

A token sees the prompt and the tokens before it, so a head for whole texts reads the last one.

Letters: B rows, T tokens, P prompt length, H hidden size.
"""

from typing import Any

from torch import Tensor

from ptv2_core.model.attention import PromptBatch, Sight
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs


class Gpt2(PlainLayers):
    """How a frozen GPT-2 is run."""

    def __init__(self, model: Any) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._model = model
        self._layers = self._model.h
        self.sights = [Sight(is_causal=True)] * len(self._layers)

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, H]`.

        It has no types of tokens: two texts of a pair are one after the other.
        """
        words = after_inputs(self.word_embeddings(input_ids), inputs)
        hidden: Tensor = self._model.drop(words + self._model.wpe(positions))
        return hidden

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; the highest has the last norm behind it."""
        output: Tensor = self._layers[index](hidden, prompts=prompts.at(index))
        return self._model.ln_f(output) if index == len(self._layers) - 1 else output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., H]` for `[...]`."""
        found: Tensor = self._model.wte(input_ids)
        return found


class Opt(PlainLayers):
    """How a frozen OPT is run.

    The smallest but one projects its words and its output between two widths; a head reads states
    of the layers' width, before the second projection.
    """

    def __init__(self, model: Any) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._decoder = model.decoder
        self._layers = self._decoder.layers
        self.sights = [Sight(is_causal=True)] * len(self._layers)

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs`."""
        words = after_inputs(self.word_embeddings(input_ids), inputs)
        if self._decoder.project_in is not None:
            words = self._decoder.project_in(words)
        # the mask is for those who give no positions
        places: Tensor = self._decoder.embed_positions(attention_mask=None, position_ids=positions)
        return words + places

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; the highest has the last norm behind it."""
        output: Tensor = self._layers[index](hidden, prompts=prompts.at(index))
        norm = self._decoder.final_layer_norm
        is_last = index == len(self._layers) - 1
        return norm(output) if is_last and norm is not None else output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, as wide as the words."""
        found: Tensor = self._decoder.embed_tokens(input_ids)
        return found
