"""What the rest of the core sees of a backbone.

Letters: B rows, T tokens, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptv2_core.model.attention import PromptBatch
from ptv2_core.model.prompts import PromptShape

PooledReading = Literal["cls", "pooler", "mean"]


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The identity and the measures of a backbone, as artifacts carry them.

    Attributes:
        name: The packaged name, the folder or the hub name it was loaded by.
        revision: The hub commit; None for a folder or the packaged backbone.
        digest: `sha256:...` over the bytes of its weight files.
        model_type: Transformers' name of the architecture.
        shape: L, N and D.
        hidden_size: H.
        num_parameters: Of the backbone, its embeddings included.
        max_positions: Tokens plus prompt positions at most.
        reads: What a classification head reads unless told otherwise.
        has_pooler: Whether the files hold a trained pooler.
    """

    name: str
    revision: str | None
    digest: str
    model_type: str
    shape: PromptShape
    hidden_size: int
    num_parameters: int
    max_positions: int
    reads: PooledReading
    has_pooler: bool

    def to_mapping(self) -> dict[str, Any]:
        """Return the plain values that an artifact stores."""
        return {
            "name": self.name,
            "revision": self.revision,
            "digest": self.digest,
            "model_type": self.model_type,
            "num_layers": self.shape.num_layers,
            "num_heads": self.shape.num_heads,
            "head_size": self.shape.head_size,
            "hidden_size": self.hidden_size,
            "num_parameters": self.num_parameters,
            "max_positions": self.max_positions,
        }


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A backbone's output for a batch, in fp32.

    Attributes:
        hidden: `[B, T, H]`, the last layer's states.
        pooled: `[B, H]` from the backbone's own pooler; None where it has none.
        token_mask: `[B, T]`, true at real tokens.
    """

    hidden: Tensor
    pooled: Tensor | None
    token_mask: Tensor

    def rows(self, index: Tensor) -> "Encoded":
        """Return the rows that `index` names."""
        return Encoded(
            hidden=self.hidden[index],
            pooled=None if self.pooled is None else self.pooled[index],
            token_mask=self.token_mask[index],
        )

    def part(self, start: int, rows: int, width: int) -> "Encoded":
        """Return so many rows from `start` on, cut to `width` tokens."""
        chosen = slice(start, start + rows)
        return Encoded(
            hidden=self.hidden[chosen, :width],
            pooled=None if self.pooled is None else self.pooled[chosen],
            token_mask=self.token_mask[chosen, :width],
        )


class Layers(Protocol):
    """How the layers of one architecture are run; a small file each."""

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None, positions: Tensor) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`."""
        ...

    def layer(self, index: int, hidden: Tensor, prompts: PromptBatch) -> Tensor:
        """Run one layer, `[B, T, H]` to `[B, T, H]`; 0 is the lowest."""
        ...

    def first_token_layer(self, index: int, hidden: Tensor, prompts: PromptBatch) -> Tensor:
        """Run one layer for the first token alone, `[B, T, H]` to `[B, 1, H]`."""
        ...

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Return the backbone's own pooled states `[B, H]`, where it has a pooler."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """States that were computed before: what the layers below the first prompt give.

    Attributes:
        hidden: `[B, T, H]`, in the backbone's number format.
        num_layers: How many layers they have passed.
    """

    hidden: Tensor
    num_layers: int


class Backbone(nn.Module):
    """A frozen transformer that takes prompts."""

    def __init__(
        self,
        model: nn.Module,
        spec: BackboneSpec,
        layers: Layers,
        *,
        first_position: int,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: The Transformers model, already on its device and in its precision.
            spec: Who it is.
            layers: How it is run.
            first_position: The position of a row's first token; not 0 in the RoBERTa family.
        """
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
        self._layers = layers
        self._first_position = first_position

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the frozen weights."""
        return next(self.model.parameters()).dtype

    @property
    def position_limit(self) -> int:
        """Tokens plus prompt positions that a row can have."""
        return self.spec.max_positions - self._first_position

    @contextmanager
    def dropout(self, seed: int | None) -> Iterator[None]:
        """Let the backbone drop out as in its own pre-training, with draws that `seed` decides.

        Args:
            seed: None leaves the backbone without dropout.
        """
        if seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    def encode(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None,
        *,
        shifts: Tensor,
        prompts: PromptBatch,
        trunk: Trunk | None = None,
        first_token_only: bool = False,
        recompute: bool = False,
    ) -> Encoded:
        """Run the backbone.

        Args:
            input_ids: `[B, T]`.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]` or None.
            shifts: `[B or 1]`, added to the row's token positions.
            prompts: Keys, values and masks for every layer.
            trunk: Where to begin; None begins at the tokens.
            first_token_only: Whether the last layer computes the first token alone.
            recompute: Whether a layer's activations are computed again in the backward pass
                instead of kept.
        """
        below = prompts.layers[: trunk.num_layers] if trunk else ()
        assert all(prompt is None for prompt in below), "a trunk ends below the first prompt"
        hidden = self._embed(input_ids, token_type_ids, shifts) if trunk is None else trunk.hidden
        last = self.spec.shape.num_layers - 1
        for index in range(trunk.num_layers if trunk else 0, last + 1):
            only_first = first_token_only and index == last
            run = self._layers.first_token_layer if only_first else self._layers.layer
            # below the first prompt nothing has a gradient, and nothing is kept
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(run, index, hidden, prompts, use_reentrant=False)
            else:
                hidden = run(index, hidden, prompts)
        pooled = self._layers.pool(hidden)
        return Encoded(
            hidden=hidden.float(),
            pooled=None if pooled is None else pooled.float(),
            token_mask=token_mask,
        )

    @torch.no_grad()
    def trunk(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None,
        *,
        num_layers: int,
    ) -> Trunk:
        """Run the lowest layers without prompts.

        Args:
            input_ids: `[B, T]`.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]` or None.
            num_layers: How many.
        """
        bare = PromptBatch.of([None] * self.spec.shape.num_layers, token_mask, self.dtype)
        unshifted = torch.zeros(1, dtype=torch.long, device=input_ids.device)
        hidden = self._embed(input_ids, token_type_ids, unshifted)
        for index in range(num_layers):
            hidden = self._layers.layer(index, hidden, bare)
        return Trunk(hidden=hidden, num_layers=num_layers)

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None, shifts: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = places[None, :] + shifts[:, None] + self._first_position  # [B or 1, T]
        # only padding can pass the end: a long row beside one with a long prompt
        positions = positions.clamp(max=self.spec.max_positions - 1)
        return self._layers.embed(input_ids, token_type_ids, positions)
