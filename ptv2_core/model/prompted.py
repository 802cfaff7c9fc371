"""The prompted model: one frozen backbone, a prompt bank and a head per slot.

Letters: B rows, T tokens, H hidden size, C classes, K slots.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ptv2_core.model.attention import PromptBatch, additive_mask
from ptv2_core.model.backbones.base import Backbone, Encoded
from ptv2_core.model.heads import LinearHead
from ptv2_core.model.prompts import NO_SLOT, PromptBank


def is_trainable_name(name: str) -> bool:
    """Tell whether a parameter of `PromptedModel` is trained, optimised, counted and saved."""
    return name.startswith(("bank.", "heads."))


class PromptedModel(nn.Module):
    """A frozen backbone that answers with the prompt and head of each row's slot."""

    def __init__(self, backbone: Backbone, bank: PromptBank, heads: Sequence[LinearHead]) -> None:
        """Freeze the backbone; slot k has prompt k and head k.

        A bank without slots and one head is a probe: the head reads the bare backbone.
        """
        super().__init__()
        self.backbone = backbone
        self.bank = bank.to(backbone.device)
        self.heads = nn.ModuleList(heads).to(backbone.device)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trainable_name(name))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the named parameters that are trained."""
        return ((n, p) for n, p in self.named_parameters() if is_trainable_name(n))

    def train(self, mode: bool = True) -> "PromptedModel":
        """Switch prompts and heads; the backbone stays without dropout, which trains better."""
        super().train(mode)
        self.backbone.eval()
        return self

    def encode(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        slots: Tensor | int = 0,
        captured: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Encoded:
        """Run the backbone once for rows of any slots.

        Args:
            input_ids: `[B, T]`, padded on the right.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]`; None: all zero.
            slots: One slot for all rows, or `[B]` with a slot per row; -1 sees the bare backbone.
            captured: Where given, receives every layer's keys and values of the tokens.
        """
        if not len(self.bank) and isinstance(slots, int):
            slots = NO_SLOT
        gathered = self.bank.gather(slots, input_ids.device)
        prompts = gathered.prompts.to(self.backbone.dtype)
        batch = PromptBatch(
            keys=prompts[:, 0],
            values=prompts[:, 1],
            mask=additive_mask(token_mask, gathered.mask, prompts.shape[4]),
            captured=captured,
        )
        return self.backbone.encode(
            input_ids, token_mask, token_type_ids, shifts=gathered.shifts, prompts=batch
        )

    def forward(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        slot: int = 0,
    ) -> Tensor:
        """Return logits `[B, C]` or `[B, T, C]` of rows that all belong to one slot."""
        encoded = self.encode(input_ids, token_mask, token_type_ids, slots=slot)
        logits: Tensor = self.heads[slot](encoded)
        return logits

    def mixed(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        slots: Tensor,
    ) -> list[Tensor]:
        """Answer rows of different tasks in one forward.

        Returns:
            For each row its slot's logits, `[C]` or `[T, C]`, and for a row without a slot the
            bare backbone's hidden states `[T, H]`.
        """
        encoded = self.encode(input_ids, token_mask, token_type_ids, slots=slots)
        results: list[Tensor] = [encoded.hidden[row] for row in range(len(slots))]
        for slot in sorted(set(slots.tolist()) - {NO_SLOT}):
            rows = (slots == slot).nonzero().flatten()
            logits = self.heads[slot](encoded.rows(rows.to(encoded.hidden.device)))
            for row, answer in zip(rows.tolist(), logits, strict=True):
                results[row] = answer
        return results


@torch.no_grad()
def sample_keys_and_values(
    model: PromptedModel, input_ids: Tensor, token_mask: Tensor, *, count: int, seed: int
) -> Tensor:
    """Return the backbone's own keys and values of `count` sampled tokens, `[L, 2, N, count, D]`.

    Args:
        model: Only its backbone is used.
        input_ids: `[B, T]`.
        token_mask: `[B, T]`, true at real tokens, of which there is at least one.
        count: P, how many tokens to sample; with replacement where there are fewer.
        seed: Of the sample.
    """
    captured: list[tuple[Tensor, Tensor]] = []
    bare = torch.full((input_ids.shape[0],), NO_SLOT)
    model.encode(input_ids, token_mask, slots=bare, captured=captured)
    places = token_mask.nonzero().cpu()  # [tokens, 2]: row and position
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator)
    if len(order) < count:
        order = order.repeat(-(-count // len(order)))
    rows, positions = places[order[:count]].unbind(dim=1)
    layers = [
        torch.stack([states[rows, :, positions].transpose(0, 1) for states in pair])
        for pair in captured  # keys and values are [B, N, T, D]
    ]
    return torch.stack(layers).float().cpu()
