"""The language model's head of a backbone, for heads that read the mask token.

Letters: H hidden size, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.families import Family
from ptv2_core.model.backbones.locating import Location
from ptv2_core.model.backbones.tokenizing import load_tokenizer


class MaskedLanguageModel:
    """The transform and the word rows of a masked language model, frozen."""

    def __init__(self, transform: nn.Module, words: nn.Linear, tokenizer: Any) -> None:
        """Take over all three; `transform` maps `[..., H]` to `[..., H]`."""
        self._transform = transform.eval().requires_grad_(False)
        self._words = words.requires_grad_(False)
        self._tokenizer = tokenizer

    def pieces(self, word: str) -> list[int]:
        """Return the token ids of a word inside a sentence; none if a piece is unknown."""
        # RoBERTa's pieces tell a word in a sentence from one at its start by the space before it
        encoded = self._tokenizer(f" {word.strip()}", add_special_tokens=False)
        found: list[int] = encoded["input_ids"]
        return [] if self._tokenizer.unk_token_id in found else found

    def transform(self, states: Tensor) -> Tensor:
        """Return the states `[..., H]` that words are compared with."""
        found: Tensor = self._transform(states)
        return found

    def word_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight `[C, H]` and bias `[C]` of some words, in fp32."""
        at = token_ids.to(self._words.weight.device)
        return self._words.weight[at].float(), self._words.bias[at].float()


class _RobertaTransform(nn.Module):
    """RoBERTa's head before its word rows; Transformers keeps both in one module."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.dense, self.norm = head.dense, head.layer_norm

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.norm(nn.functional.gelu(self.dense(states)))
        return found


def load_language_model(
    location: Location, config: Any, family: Family, dtype: torch.dtype, device: torch.device
) -> MaskedLanguageModel:
    """Load the language model's head that a backbone was trained with.

    Args:
        location: The backbone's files.
        config: Its configuration.
        family: Of its architecture.
        dtype: Number format of its weights.
        device: Where to put them.

    Raises:
        BackboneError: The files hold none.
    """
    if not family.has_verbalizer:
        raise _without(location, f"that of {config.model_type} is not known here")
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            location.folder,
            attn_implementation=family.attention,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ValueError as error:
        raise _without(location, f"{config.model_type} has no masked language model") from error
    head = getattr(getattr(model, "cls", None), "predictions", None) or getattr(
        model, "lm_head", None
    )
    if head is None:
        raise _without(location, f"that of {config.model_type} is not known here")
    prefixes = ("cls.predictions.", "lm_head.")
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefixes))
    if missing:
        raise _without(location, f"missing: {', '.join(missing[:3])}")
    transform = getattr(head, "transform", None) or _RobertaTransform(head)
    tokenizer = load_tokenizer(location)
    return MaskedLanguageModel(transform.to(device), head.decoder.to(device), tokenizer)


def _without(location: Location, why: str) -> BackboneError:
    return BackboneError(
        f"train.head.type: a verbalizer reads the language model of the backbone, and the files of "
        f"{location.name!r} hold none ({why}); expected linear, or a backbone with its language "
        "model, such as bert-base-uncased"
    )
