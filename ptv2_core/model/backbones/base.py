"""What the rest of the core sees of a backbone.

Letters: B rows, T tokens, H hidden size.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptv2_core.errors import BackboneError
from ptv2_core.model.attention import PromptBatch
from ptv2_core.model.backbones.layers import Layers, PlainLayers, Shared
from ptv2_core.model.backbones.packing import PackedLinear
from ptv2_core.model.backbones.rounding import Rounding, number_format, size_bytes
from ptv2_core.model.prompts import PromptShape

PooledReading = Literal["cls", "pooler", "mean", "last"]


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
        is_causal: Whether a token sees none that stands after it.
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
    is_causal: bool = False

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
        masked: `[B, H]`, of each row's mask token, after the transform of the backbone's language
            model; None where it was not asked for.
    """

    hidden: Tensor
    pooled: Tensor | None
    token_mask: Tensor
    masked: Tensor | None = None

    def rows(self, index: Tensor) -> "Encoded":
        """Return the rows that `index` names."""
        return Encoded(
            hidden=self.hidden[index],
            pooled=None if self.pooled is None else self.pooled[index],
            token_mask=self.token_mask[index],
            masked=None if self.masked is None else self.masked[index],
        )

    def part(self, start: int, rows: int, width: int) -> "Encoded":
        """Return so many rows from `start` on, cut to `width` tokens."""
        chosen = slice(start, start + rows)
        return Encoded(
            hidden=self.hidden[chosen, :width],
            pooled=None if self.pooled is None else self.pooled[chosen],
            token_mask=self.token_mask[chosen, :width],
            masked=None if self.masked is None else self.masked[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """States that were computed before: what the layers below the first prompt give.

    Attributes:
        hidden: `[B, T, H]`, in the backbone's number format.
        num_layers: How many layers they have passed.
    """

    hidden: Tensor
    num_layers: int


class LanguageModel(Protocol):
    """The language model's head of a backbone, frozen."""

    def transform(self, states: Tensor) -> Tensor:
        """Return the states `[..., H]` that words are compared with."""
        ...

    def word_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight `[C, H]` and bias `[C]` of some words, in fp32."""
        ...

    def pieces(self, word: str) -> list[int]:
        """Return the token ids of a word inside a sentence; none if a piece is unknown."""
        ...


class Backbone(nn.Module):
    """A transformer that takes prompts, frozen but in fine-tuning.

    Attributes:
        model: The Transformers model.
        spec: Who it is.
        language_model: Its language model's head; None where it was not loaded.
        is_tuned: Whether its own weights are trained.
        rounding: What rounded its weights to 8 or 4 bits; None where nothing did.
        has_token_types: Whether it tells a second text by the type of its tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: BackboneSpec,
        make_layers: Callable[[nn.Module], Layers],
        *,
        first_position: int,
        language_model: LanguageModel | None = None,
        product_dtype: torch.dtype | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: The Transformers model, already on its device and in its precision.
            spec: Who it is.
            make_layers: How it is run.
            first_position: The position of a row's first token; not 0 in the RoBERTa family.
            language_model: For heads that read the mask token.
            product_dtype: In which a copy that is tuned computes its products, while its weights
                stay in fp32; None: in that of the weights.
            rounding: What rounded its weights.
        """
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
        self.language_model = language_model
        self.is_tuned = False
        self.rounding = rounding
        self._make_layers = make_layers
        self._layers = make_layers(model)
        self._first_position = first_position
        self._product_dtype = product_dtype
        # where there is one type of tokens alone, a tokenizer's second one has no embedding
        config: Any = self.model.config
        self.has_token_types = (getattr(config, "type_vocab_size", None) or 0) > 1

    def tunable_copy(self) -> "Backbone":
        """Return a copy whose own weights can be trained; this one stays as it is.

        The head of the language model stays frozen, and both use it.

        Raises:
            BackboneError: The weights were loaded for products alone, not in fp32.
        """
        is_packed = any(isinstance(module, PackedLinear) for module in self.modules())
        if self.dtype != torch.float32 or is_packed or self.rounding is not None:
            raise BackboneError(
                f"{self.spec.name}: fine-tuning needs the weights in fp32, unpacked; load the "
                "backbone with precision fp32 and packs=False"
            )
        copied = Backbone(
            copy.deepcopy(self.model),
            self.spec,
            self._make_layers,
            first_position=self._first_position,
            language_model=self.language_model,
            product_dtype=self._product_dtype,
        )
        copied.is_tuned = True
        return copied

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights; of rounded ones, that of all others."""
        return next(one.dtype for one in self.model.parameters() if one.is_floating_point())

    @property
    def states_dtype(self) -> torch.dtype:
        """The number format of what attention sees."""
        return self._product_dtype or self.dtype if self.is_tuned else self.dtype

    @property
    def number_format(self) -> str:
        """How it computes, by name: `float32`, `bfloat16`, `int8+bfloat16`."""
        return number_format(self.rounding, self.states_dtype)

    @property
    def answering_digest(self) -> str:
        """Of what it answers with: the digest of the files in fp32, another in each other format.

        Prompts are matched against `spec.digest`; scores and states are those of this one.
        """
        if self.number_format == "float32":
            return self.spec.digest
        text = f"{self.spec.digest}\n{self.number_format}"
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def size_bytes(self) -> int:
        """What its weights take in memory."""
        return size_bytes(self.model)

    @property
    def position_limit(self) -> int:
        """Tokens plus prompt positions that a row can have."""
        return self.spec.max_positions - self._first_position

    @property
    def window(self) -> int | None:
        """How far back a token sees others in its narrowest layer; None: however far."""
        windows = [sight.window for sight in self._layers.sights if sight.window is not None]
        return min(windows, default=None)

    @property
    def trims_last_layer(self) -> bool:
        """Whether its last layer has a way of its own to compute the first token alone."""
        own: Any = type(self._layers)
        return own.first_token_layer is not PlainLayers.first_token_layer

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
        inputs: Tensor | None = None,
        trunk: Trunk | None = None,
        first_token_only: bool = False,
        read_at: Tensor | None = None,
        recompute: bool = False,
    ) -> Encoded:
        """Run the backbone.

        Args:
            input_ids: `[B, T]`.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]` or None; not read where the backbone has no types.
            shifts: `[B or 1]`, added to the row's token positions.
            prompts: Keys, values and masks for every layer; with `inputs`, masks of `P + T`.
            inputs: `[P, H]`, word embeddings that stand before the tokens.
            trunk: Where to begin; None begins at the tokens.
            first_token_only: Whether the last layer computes the first token alone.
            read_at: `[B]`, the mask token of each row, where a head reads it.
            recompute: Whether a layer's activations are computed again in the backward pass
                instead of kept.
        """
        below = prompts.layers[: trunk.num_layers] if trunk else ()
        assert all(prompt is None for prompt in below), "a trunk ends below the first prompt"
        with self._products():
            hidden = self._run(
                input_ids, token_mask, token_type_ids, shifts, prompts, inputs, trunk,
                first_token_only, recompute,
            )  # fmt: skip
            if inputs is not None:
                hidden = hidden[:, len(inputs) :]
            pooled = self._layers.pool(hidden)
            masked = None
            if read_at is not None:
                assert self.language_model is not None, "a head that reads the mask asked for it"
                rows = torch.arange(len(read_at), device=hidden.device)
                masked = self.language_model.transform(hidden[rows, read_at]).float()
        return Encoded(
            hidden=hidden.float(),
            pooled=None if pooled is None else pooled.float(),
            token_mask=token_mask,
            masked=masked,
        )

    def _products(self) -> AbstractContextManager[Any]:
        """Compute the products of a copy that is tuned in its own format."""
        if not self.is_tuned or self._product_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._product_dtype)

    def _run(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None,
        shifts: Tensor,
        prompts: PromptBatch,
        inputs: Tensor | None,
        trunk: Trunk | None,
        first_token_only: bool,
        recompute: bool,
    ) -> Tensor:
        """Return the last layer's states `[B, T, H]`, or `[B, P + T, H]` with `inputs`."""
        positions = self._positions(input_ids, shifts, inputs)
        if trunk is not None:
            hidden = trunk.hidden
        else:
            hidden = self._embed(input_ids, token_type_ids, positions, inputs)
        if inputs is not None:
            token_mask = nn.functional.pad(token_mask, (len(inputs), 0), value=True)
        shared, prompts = self._begin(hidden, positions, token_mask, prompts)
        last = self.spec.shape.num_layers - 1
        for index in range(trunk.num_layers if trunk else 0, last + 1):
            only_first = first_token_only and index == last
            run = self._layers.first_token_layer if only_first else self._layers.layer
            # below the first prompt nothing has a gradient, and nothing is kept
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(run, index, hidden, prompts, shared, use_reentrant=False)
            else:
                hidden = run(index, hidden, prompts, shared)
        return hidden

    def _embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        positions: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return what the lowest layer reads, `[B, T, H]`; longer by `inputs` `[P, H]`."""
        types = token_type_ids if self.has_token_types else None
        return self._layers.embed(input_ids, types, positions, inputs)

    def _begin(
        self, hidden: Tensor, positions: Tensor, token_mask: Tensor, prompts: PromptBatch
    ) -> tuple[Shared, PromptBatch]:
        """Return what all layers are told beside their states."""
        width = hidden.shape[1]
        limited = prompts.limited(self._layers.sights, width, self.states_dtype, hidden.device)
        return self._layers.share(hidden, positions, token_mask), limited

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens in fp32, `[..., H]` for `[...]`."""
        return self._layers.word_embeddings(input_ids).float()

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
        positions = self._positions(input_ids, unshifted)
        hidden = self._embed(input_ids, token_type_ids, positions)
        shared, bare = self._begin(hidden, positions, token_mask, bare)
        for index in range(num_layers):
            hidden = self._layers.layer(index, hidden, bare, shared)
        return Trunk(hidden=hidden, num_layers=num_layers)

    def _positions(self, input_ids: Tensor, shifts: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return the positions of tokens `[B or 1, T]`, or `[B or 1, P + T]` with `inputs`."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = places[None, :] + shifts[:, None]  # [B or 1, T]
        if inputs is not None:
            before = torch.arange(len(inputs), device=input_ids.device)
            positions = torch.cat([before.expand(len(positions), -1), positions], dim=1)
        positions = positions + self._first_position
        # only padding can pass the end: a long row beside one with a long prompt
        return positions.clamp(max=self.spec.max_positions - 1)
