"""What the rest of the core sees of a backbone.

Letters: B rows, T tokens, H hidden size.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

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


class Injection(Protocol):
    """One way of bringing prompts into an architecture; a small file each."""

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        prompts: PromptBatch,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the last hidden states `[B, T, H]` and the pooled `[B, H]`, where there is one."""
        ...


class Backbone(nn.Module):
    """A frozen transformer that takes prompts."""

    def __init__(
        self, model: nn.Module, spec: BackboneSpec, injection: Injection, *, first_position: int
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: The Transformers model, already on its device and in its precision.
            spec: Who it is.
            injection: How prompts get in.
            first_position: The position of a row's first token; not 0 in the RoBERTa family.
        """
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
        self._injection = injection
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

    def encode(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None,
        *,
        shifts: Tensor,
        prompts: PromptBatch,
    ) -> Encoded:
        """Run the backbone.

        Args:
            input_ids: `[B, T]`.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]` or None.
            shifts: `[B or 1]`, added to the row's token positions.
            prompts: Keys, values and mask for every layer.
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = places[None, :] + shifts[:, None] + self._first_position  # [B or 1, T]
        # only padding can pass the end: a long row beside one with a long prompt
        positions = positions.clamp(max=self.spec.max_positions - 1)
        hidden, pooled = self._injection(self.model, input_ids, token_type_ids, positions, prompts)
        return Encoded(
            hidden=hidden.float(),
            pooled=None if pooled is None else pooled.float(),
            token_mask=token_mask,
        )
