"""The prompt bank: K slots, each a prompt of keys and values for every layer.

Letters: B rows, T tokens, P prompt length, L layers, N key/value heads, D head size, H hidden
size, K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    def num_elements(self, prompt_length: int) -> int:
        """Return `2 * L * P * N * D`, the elements of a prompt."""
        return 2 * self.num_layers * prompt_length * self.num_heads * self.head_size


class EmbeddingPrompt(nn.Module):
    """A prompt whose keys and values are trained themselves."""

    def __init__(self, start: Tensor) -> None:
        """Take `start` `[L, 2, N, P, D]` as the first value."""
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """Return the prompt `[L, 2, N, P, D]`."""
        return self.weight


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
    """Make one slot's prompt.

    Args:
        shape: L, N and D of the backbone.
        config: Length, reparameterization and start.
        seed: Of the random start.
        start: `[L, 2, N, P, D]` to begin with; only an `embedding` can begin at a given place.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.reparameterization == "mlp":
        return MlpPrompt(shape, config.length, config.mlp_hidden, generator)
    if start is None:
        size = (shape.num_layers, 2, shape.num_heads, config.length, shape.head_size)
        start = torch.randn(size, generator=generator) * config.start_std
    return EmbeddingPrompt(start)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The prompts of a batch's rows, padded to the longest.

    Attributes:
        prompts: `[L, 2, B or 1, N, P, D]`; one row stands for all rows.
        mask: `[B, P]`, true at positions of the row's own prompt; None: all are.
        shifts: `[B or 1]`, the positions by which the row's tokens are shifted.
    """

    prompts: Tensor
    mask: Tensor | None
    shifts: Tensor


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

    def prompt(self, slot: int) -> Tensor:
        """Return slot's prompt `[L, 2, N, P, D]`, with dropout in a training step."""
        prompt: Tensor = self.slots[slot]()
        return nn.functional.dropout(prompt, self.configs[slot].dropout, training=self.training)

    def flatten(self, slot: int) -> Tensor:
        """Return what is saved: the slot's prompt `[L, 2, N, P, D]`, detached, fp32, on the CPU."""
        with torch.no_grad():
            flat: Tensor = self.slots[slot]()
        return flat.detach().float().cpu().contiguous()

    def gather(self, slots: Tensor | int, device: torch.device) -> Gathered:
        """Collect the prompts for rows.

        Args:
            slots: One slot for all rows, or `[B]` with a slot per row; -1 is a row without one.
            device: Where the result is wanted.
        """
        if isinstance(slots, int):
            return self._one(slots, device)
        named: list[int] = slots.tolist()
        unique = sorted(set(named))
        if len(unique) == 1:
            return self._one(unique[0], device)
        longest = max(self._length(slot) for slot in unique)
        padded = torch.stack([self._padded(slot, longest, device) for slot in unique])
        index = torch.tensor([unique.index(slot) for slot in named], device=device)
        # [U, L, 2, N, P, D] -> [B, L, 2, N, P, D] -> [L, 2, B, N, P, D]
        prompts = padded.index_select(0, index).permute(1, 2, 0, 3, 4, 5)
        lengths = torch.tensor([self._length(slot) for slot in named], device=device)
        shifts = torch.tensor([self.shift(slot) for slot in named], device=device)
        mask = torch.arange(longest, device=device)[None, :] < lengths[:, None]  # [B, P]
        return Gathered(prompts=prompts, mask=mask, shifts=shifts)

    def _one(self, slot: int, device: torch.device) -> Gathered:
        shifts = torch.tensor([self.shift(slot)], device=device)
        prompts = self._padded(slot, self._length(slot), device)
        return Gathered(prompts=prompts[:, :, None], mask=None, shifts=shifts)

    def _length(self, slot: int) -> int:
        return 0 if slot == NO_SLOT else self.configs[slot].length

    def shift(self, slot: int) -> int:
        """Return by how many positions the slot's tokens are shifted; 0 without a slot."""
        if slot == NO_SLOT or not self.configs[slot].shift_positions:
            return 0
        return self.configs[slot].length

    def _padded(self, slot: int, length: int, device: torch.device) -> Tensor:
        """Return slot's prompt with its positions padded by zeros to `[L, 2, N, length, D]`."""
        shape = self.shape
        if slot == NO_SLOT:
            size = (shape.num_layers, 2, shape.num_heads, length, shape.head_size)
            return torch.zeros(size, device=device)
        missing = length - self.configs[slot].length
        return nn.functional.pad(self.prompt(slot), (0, 0, 0, missing))
