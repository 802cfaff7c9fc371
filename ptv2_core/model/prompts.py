"""The prompt bank: K slots, each a prompt of keys and values for every layer.

Letters: B rows, T tokens, P prompt length, L layers, N key/value heads, D head size, H hidden
size, K slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptv2_core.config import PromptConfig

NO_SLOT = -1


@dataclass(frozen=True, kw_only=True)
class PromptShape:
    """What a backbone asks of a prompt: L layers, N key/value heads of size D."""

    num_layers: int
    num_heads: int
    head_size: int


class EmbeddingPrompt(nn.Module):
    """A prompt whose keys and values are trained themselves."""

    def __init__(self, start: Tensor) -> None:
        """Take `start` `[L, 2, N, P, D]` as the first value."""
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """Return the prompt `[L, 2, N, P, D]`."""
        return self.weight

    @torch.no_grad()
    def shift_keys(self, shift: Tensor) -> None:
        """Add `[L, N, D]` to the keys of all positions."""
        self.weight[:, 0] += shift[:, :, None]


class MlpPrompt(nn.Module):
    """A prompt produced from P embeddings by a two-layer MLP (paper, section 3.2)."""

    def __init__(
        self, shape: PromptShape, prompt_length: int, hidden: int, generator: torch.Generator
    ) -> None:
        """Draw the embeddings and both layers from `generator`."""
        super().__init__()
        self.shape = shape
        width = shape.num_heads * shape.head_size
        self.embedding = nn.Parameter(torch.randn(prompt_length, width, generator=generator))
        self.inner = _linear(width, hidden, generator)
        self.outer = _linear(hidden, 2 * shape.num_layers * width, generator)

    def forward(self) -> Tensor:
        """Return the prompt `[L, 2, N, P, D]`."""
        shape = self.shape
        flat: Tensor = self.outer(torch.tanh(self.inner(self.embedding)))  # [P, L * 2 * N * D]
        split = flat.view(-1, shape.num_layers, 2, shape.num_heads, shape.head_size)
        return split.permute(1, 2, 3, 0, 4)  # [P, L, 2, N, D] -> [L, 2, N, P, D]

    @torch.no_grad()
    def shift_keys(self, shift: Tensor) -> None:
        """Add `[L, N, D]` to the keys of all positions."""
        shape = self.shape
        self.outer.bias.view(shape.num_layers, 2, shape.num_heads, shape.head_size)[:, 0] += shift


class InputPrompt(nn.Module):
    """A prompt of word embeddings before the lowest layer alone (Lester et al. 2021)."""

    def __init__(self, start: Tensor) -> None:
        """Take `start` `[P, H]` as the first value."""
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """Return the prompt `[P, H]`."""
        return self.weight


class NoPrompt(nn.Module):
    """The prompt of a slot that has none: its head reads the bare backbone."""

    def forward(self) -> Tensor:
        """Return nothing, `[0]`."""
        return torch.empty(0)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer with torch's own start, drawn from `generator`."""
    # not nn.Linear(): that would draw from the global random state
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs, outputs
    )
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def make_prompt(
    shape: PromptShape, config: PromptConfig, *, seed: int, start: Tensor | None = None
) -> EmbeddingPrompt | MlpPrompt:
    """Make one slot's prompt, for the layers that `config` names.

    Args:
        shape: L, N and D of the backbone.
        config: Length, layers, reparameterization and start.
        seed: Of the random start.
        start: `[L, 2, N, P, D]` to begin with, for all layers of the backbone; only an
            `embedding` can begin at a given place.

    Raises:
        ConfigError: `config` names a layer that the backbone does not have.
    """
    layers = config.layer_indices(shape.num_layers)
    own = replace(shape, num_layers=len(layers))
    generator = torch.Generator().manual_seed(seed)
    if config.reparameterization == "mlp":
        return MlpPrompt(own, config.length, config.mlp_hidden, generator)
    if start is not None:
        return EmbeddingPrompt(start[list(layers)])
    size = (own.num_layers, 2, own.num_heads, config.length, own.head_size)
    return EmbeddingPrompt(torch.randn(size, generator=generator) * config.start_std)


@dataclass(frozen=True, kw_only=True)
class LayerPrompt:
    """What one layer sees of a batch's prompts, padded to the longest.

    Attributes:
        pairs: Keys and values, `[B or 1, 2, N, P, D]`, where one row stands for all rows; or
            `[2, N, P, D]` of each row, joined when the layer asks.
        mask: `[B, P]`, true at positions of the row's own prompt; None: all are.
        scratch: `[B, 2, N, P, D]`, where separate rows are joined; layers that are run one after
            the other share it.
    """

    pairs: Tensor | tuple[Tensor, ...]
    mask: Tensor | None
    scratch: Tensor | None = None

    @property
    def length(self) -> int:
        """Return P."""
        return self.pairs[0].shape[2]

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return the keys and the values, `[B or 1, N, P, D]` each, until another layer asks."""
        pairs = self.pairs
        if isinstance(pairs, tuple):
            pairs = torch.stack(pairs, out=self.scratch)
        keys, values = pairs.unbind(1)
        return keys, values


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The prompts of a batch's rows.

    Attributes:
        layers: One for each layer of the backbone; None where no row has a prompt.
        shifts: `[B or 1]`, the positions by which the row's tokens are shifted.
        inputs: `[P, H]`, word embeddings that stand before the tokens of all rows; None: there
            are none.
    """

    layers: Sequence[LayerPrompt | None]
    shifts: Tensor
    inputs: Tensor | None = None


class PromptBank(nn.Module):
    """K slots; a batch row names its slot, or none."""

    def __init__(
        self, shape: PromptShape, slots: Sequence[tuple[nn.Module, PromptConfig]] = ()
    ) -> None:
        """Hold the given prompts, slot 0 first."""
        super().__init__()
        self.shape = shape
        self.configs = [config for _, config in slots]
        self.slots = nn.ModuleList([prompt for prompt, _ in slots])

    def __len__(self) -> int:
        """Return K."""
        return len(self.slots)

    def put(self, slot: int, prompt: nn.Module, config: PromptConfig) -> None:
        """Give a slot another prompt, or make it if it is the next one."""
        if slot == len(self):
            self.configs.append(config)
            self.slots.append(prompt)
        else:
            self.configs[slot] = config
            self.slots[slot] = prompt

    def layers(self, slot: int) -> tuple[int, ...]:
        """Return the layers in which a slot has a prompt, lowest first; none without a slot."""
        if slot == NO_SLOT or not self._is_deep(slot):
            return ()
        return self.configs[slot].layer_indices(self.shape.num_layers)

    def first_layer(self, slot: int) -> int:
        """Return the lowest layer with a prompt: below it, all slots see the bare backbone."""
        if slot != NO_SLOT and isinstance(self.slots[slot], InputPrompt):
            return 0
        return min(self.layers(slot), default=self.shape.num_layers)

    def prompt(self, slot: int, keep: Tensor | None = None) -> Tensor:
        """Return a slot's prompt `[its layers, 2, N, P, D]`.

        Args:
            slot: Which.
            keep: Of the same shape: what dropout leaves of each element; None leaves all.
        """
        prompt: Tensor = self.slots[slot]()
        return prompt if keep is None else prompt * keep

    def flatten(self, slot: int) -> Tensor:
        """Return what is saved, detached, fp32, on the CPU.

        `[its layers, 2, N, P, D]` of a deep prompt, `[P, H]` of one before the lowest layer, `[0]`
        of none.
        """
        with torch.no_grad():
            flat: Tensor = self.slots[slot]()
        return flat.detach().float().cpu().contiguous()

    def shift(self, slot: int) -> int:
        """Return by how many positions the slot's tokens are shifted; 0 without a slot.

        Positions make room for a prompt that stands before the tokens in the lowest layer. With
        none there, what lies below the first prompt is the bare backbone, equal for all prompts.
        """
        if slot == NO_SLOT or not self.configs[slot].shift_positions or self.first_layer(slot):
            return 0
        return self.configs[slot].length

    def gather(
        self,
        slots: Tensor | int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        keep: Mapping[int, Tensor] | None = None,
    ) -> Gathered:
        """Collect the prompts for rows.

        Args:
            slots: One slot for all rows, or `[B]` with a slot per row; -1 is a row without one.
            device: Where the result is wanted.
            dtype: In which number format.
            keep: What dropout leaves of a slot's prompt, as for `prompt`.
        """
        keep = keep or {}
        named: list[int] = [slots] if isinstance(slots, int) else slots.tolist()
        unique = sorted(set(named))
        if len(unique) == 1:
            return self._one(unique[0], device, dtype, keep)
        assert not any(isinstance(self.slots[slot], InputPrompt) for slot in unique if slot >= 0), (
            "prompts before the lowest layer are never mixed"
        )
        layers: list[LayerPrompt | None] = [None] * self.shape.num_layers
        own = {slot: self.layers(slot) for slot in unique}
        union = sorted({layer for slot in unique for layer in own[slot]})
        if union:
            longest = max(self.configs[slot].length for slot in unique if own[slot])
            padded = {
                slot: self._padded(slot, union, longest, keep.get(slot)).to(device, dtype)
                for slot in unique
            }
            if torch.is_grad_enabled():
                # by way of one a slot, so that its gradient is one sum over its rows
                index = torch.tensor([unique.index(slot) for slot in named], device=device)
                rows = torch.stack(list(padded.values())).index_select(0, index)
                by_layer: Sequence[Tensor | tuple[Tensor, ...]] = rows.unbind(1)
                scratch = None
            else:
                # nothing is copied yet: memory that is new in every forward costs more than the
                # copy, and all layers want what one does
                parts = {slot: prompt.unbind(0) for slot, prompt in padded.items()}
                by_layer = list(zip(*(parts[slot] for slot in named), strict=True))
                scratch = by_layer[0][0].new_empty((len(named), *by_layer[0][0].shape))
            masks: dict[tuple[int, ...], Tensor] = {}
            for layer, pairs in zip(union, by_layer, strict=True):
                lengths = tuple(
                    self.configs[slot].length if layer in own[slot] else 0 for slot in named
                )
                if lengths not in masks:
                    sizes = torch.tensor(lengths, device=device)
                    masks[lengths] = torch.arange(longest, device=device)[None] < sizes[:, None]
                layers[layer] = LayerPrompt(pairs=pairs, mask=masks[lengths], scratch=scratch)
        shifts = torch.tensor([self.shift(slot) for slot in named], device=device)
        return Gathered(layers=layers, shifts=shifts)

    def _one(
        self, slot: int, device: torch.device, dtype: torch.dtype, keep: Mapping[int, Tensor]
    ) -> Gathered:
        layers: list[LayerPrompt | None] = [None] * self.shape.num_layers
        inputs = None
        if slot != NO_SLOT and isinstance(self.slots[slot], InputPrompt):
            inputs = self.prompt(slot, keep.get(slot)).to(device, dtype)
        if self.layers(slot):
            prompt = self.prompt(slot, keep.get(slot)).to(device, dtype)
            # unbind, not indexing: its gradient is one stack, not a sum of L padded tensors
            for layer, pairs in zip(self.layers(slot), prompt[:, None].unbind(0), strict=True):
                layers[layer] = LayerPrompt(pairs=pairs, mask=None)
        shifts = torch.tensor([self.shift(slot)], device=device)
        return Gathered(layers=layers, shifts=shifts, inputs=inputs)

    def _is_deep(self, slot: int) -> bool:
        return not isinstance(self.slots[slot], InputPrompt | NoPrompt)

    def _padded(self, slot: int, union: list[int], length: int, keep: Tensor | None) -> Tensor:
        """Return a slot's prompt as `[union, 2, N, length, D]`, zero where it has none."""
        shape = self.shape
        size = (len(union), 2, shape.num_heads, length, shape.head_size)
        own = self.layers(slot)
        if not own:
            return torch.zeros(1).expand(size)
        prompt = self.prompt(slot, keep)
        if prompt.shape[3] < length:
            prompt = nn.functional.pad(prompt, (0, 0, 0, length - prompt.shape[3]))
        if list(own) == union:
            return prompt
        places = torch.tensor([union.index(layer) for layer in own], device=prompt.device)
        return prompt.new_zeros(size).index_copy(0, places, prompt)
