"""Layers whose queries and keys are turned by their places: ModernBERT, EuroBERT, Llama and kin.

A prompt's keys are keys as attention sees them, after the turning: they have no place, and a token
turns its query alone. So Hugging Face's PEFT keeps them too. Windows limit what a token sees of
tokens; a prompt is always seen. One with fewer key than query heads has as few in its prompts.

Letters: B rows, T tokens, P prompt length, H hidden size.
"""

from typing import Any

from torch import Tensor

from ptv2_core.model.attention import PromptBatch, Sight
from ptv2_core.model.backbones.layers import PlainLayers, Shared
from ptv2_core.model.backbones.words import after_inputs

SLIDING = "sliding_attention"


class Rotary(PlainLayers):
    """How a frozen model with one rotary table is run: EuroBERT and decoders."""

    def __init__(self, model: Any, *, is_causal: bool) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._model = model
        self._layers = self._model.layers
        config = self._model.config
        kinds = getattr(config, "layer_types", None) or [""] * len(self._layers)
        # a window counts the token itself
        self.sights = [
            Sight(
                is_causal=is_causal, window=config.sliding_window - 1 if kind == SLIDING else None
            )
            for kind in kinds
        ]

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, H]`."""
        return after_inputs(self.word_embeddings(input_ids), inputs)

    def share(self, hidden: Tensor, positions: Tensor, token_mask: Tensor) -> Shared:
        """Return the cosines and sines of all places."""
        return {"tables": self._model.rotary_emb(hidden, position_ids=positions)}

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; the highest has the last norm behind it."""
        output: Tensor = self._layers[index](
            hidden, position_embeddings=shared["tables"], prompts=prompts.at(index)
        )
        return self._model.norm(output) if index == len(self._layers) - 1 else output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., H]` for `[...]`."""
        found: Tensor = self._model.embed_tokens(input_ids)
        return found


def rotary_encoder(model: Any) -> Rotary:
    """Run a model in which tokens see all others."""
    return Rotary(model, is_causal=False)


def rotary_decoder(model: Any) -> Rotary:
    """Run a model in which tokens see those before them."""
    return Rotary(model, is_causal=True)


class ModernBert(PlainLayers):
    """How a frozen ModernBERT is run: global and local layers, each with their own table."""

    def __init__(self, model: Any) -> None:
        """Run `model`, whose configuration names our attention function."""
        self._model = model
        self._layers = self._model.layers
        config = self._model.config
        self._kinds = list(config.layer_types)
        self.sights = [
            Sight(window=config.sliding_window if kind == SLIDING else None) for kind in self._kinds
        ]

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, H]`."""
        words = after_inputs(self.word_embeddings(input_ids), inputs)
        hidden: Tensor = self._model.embeddings(inputs_embeds=words)
        return hidden

    def share(self, hidden: Tensor, positions: Tensor, token_mask: Tensor) -> Shared:
        """Return the cosines and sines of all places, for each kind of layer."""
        rotary = self._model.rotary_emb
        return {
            kind: rotary(hidden, position_ids=positions, layer_type=kind)
            for kind in set(self._kinds)
        }

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; the highest has the last norm behind it."""
        output: Tensor = self._layers[index](
            hidden, position_embeddings=shared[self._kinds[index]], prompts=prompts.at(index)
        )
        return self._model.final_norm(output) if index == len(self._layers) - 1 else output

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the frozen embeddings of tokens, `[..., H]` for `[...]`."""
        found: Tensor = self._model.embeddings.tok_embeddings(input_ids)
        return found
