"""How the layers of one architecture are run: what each small file beside this one says of its own.

Letters: B rows, T tokens, H hidden size, P prompt length.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ptv2_core.model.attention import PromptBatch, Sight

Shared = Mapping[str, Any]
"""What an architecture computes once for all layers of a forward, such as rotary tables."""


class Layers(Protocol):
    """How the layers of one architecture are run; a small file each."""

    @property
    def sights(self) -> Sequence[Sight]:
        """Which tokens a token sees, for each layer."""
        ...

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, H]`."""
        ...

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens, `[..., H]` for `[...]`."""
        ...

    def share(self, hidden: Tensor, positions: Tensor, token_mask: Tensor) -> Shared:
        """Return what all layers of a forward are told.

        Args:
            hidden: `[B, T, H]`, of the format and on the device of the states.
            positions: `[B or 1, T]`.
            token_mask: `[B, T]`, true at real tokens.
        """
        ...

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest.

        The highest gives what the backbone gives: where there is a norm behind it, after that.
        """
        ...

    def first_token_layer(
        self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared
    ) -> Tensor:
        """Run one layer for the first token alone, `[B, T, H]` to `[B, 1, H]`."""
        ...

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Return the backbone's own pooled states `[B, H]`, where it has a pooler."""
        ...


class PlainLayers(ABC):
    """What most architectures have in common; those that have more say so themselves."""

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared) -> Tensor:
        """Run one layer, see `Layers`."""

    def first_token_layer(
        self, index: int, hidden: Tensor, prompts: PromptBatch, shared: Shared
    ) -> Tensor:
        """Return the first token of a layer that computes all of them, `[B, 1, H]`."""
        return self.layer(index, hidden, prompts, shared)[:, :1]

    def share(self, hidden: Tensor, positions: Tensor, token_mask: Tensor) -> Shared:
        """Return nothing: places are in the embeddings alone."""
        return {}

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Return None: there is no pooler."""
        return None
