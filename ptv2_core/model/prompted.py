"""The prompted model: one frozen backbone, a prompt bank and a head per slot.

Letters: B rows, T tokens, H hidden size, C classes, K slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptv2_core.config import PromptConfig
from ptv2_core.model.attention import Captured, PromptBatch
from ptv2_core.model.backbones.base import Backbone, Encoded, Trunk
from ptv2_core.model.heads import LinearHead, reads_first_token
from ptv2_core.model.prompts import NO_SLOT, PromptBank

BACKBONE = "backbone."


def is_trainable_name(name: str) -> bool:
    """Tell whether a parameter of a model on a frozen backbone is trained, counted and saved."""
    return name.startswith(("bank.", "heads."))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that all belong to one slot, padded on the right.

    Attributes:
        slot: Whose prompt and head answer them.
        input_ids: `[B, T]`.
        token_mask: `[B, T]`, true at real tokens.
        token_type_ids: `[B, T]`, or None where all are zero.
        trunk: What layers below the slot's first prompt give; None computes it.
        prompt_keep: What dropout leaves of the prompt, of its shape; None leaves all.
        head_keep: What dropout leaves of what the head reads, of its shape; None leaves all.
        read_at: `[B]`, each row's mask token, for a head that reads it.
    """

    slot: int
    input_ids: Tensor
    token_mask: Tensor
    token_type_ids: Tensor | None = None
    trunk: Trunk | None = None
    prompt_keep: Tensor | None = None
    head_keep: Tensor | None = None
    read_at: Tensor | None = None


class PromptedModel(nn.Module):
    """A backbone that answers with the prompt and head of each row's slot.

    The backbone is frozen, but where it is a copy of its own that fine-tuning trains.

    Attributes:
        trims_last_layer: Whether the last layer computes the first token alone where no head reads
            more. The answers are the same; a benchmark shows what it saves.
    """

    trims_last_layer = True

    def __init__(self, backbone: Backbone, bank: PromptBank, heads: Sequence[LinearHead]) -> None:
        """Freeze the backbone unless it is tuned; slot k has prompt k and head k."""
        super().__init__()
        self.backbone = backbone
        self.bank = bank.to(backbone.device)
        self.heads = nn.ModuleList(heads).to(backbone.device)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trainable_name(name) or backbone.is_tuned)

    def trainable(self, slot: int | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the named parameters that are trained: of one slot, or of all.

        The weights of a backbone that is tuned are among them.
        """
        own: tuple[str, ...] = ("bank.", "heads.")
        if slot is not None:
            own = (f"bank.slots.{slot}.", f"heads.{slot}.")
        if self.backbone.is_tuned:
            own = (*own, BACKBONE)
        return ((name, p) for name, p in self.named_parameters() if name.startswith(own))

    def put(self, slot: int, prompt: nn.Module, config: PromptConfig, head: LinearHead) -> None:
        """Give a slot another prompt and head, or make it if it is the next one."""
        device = self.backbone.device
        self.bank.put(slot, prompt.to(device), config)
        if slot == len(self.heads):
            self.heads.append(head.to(device))
        else:
            self.heads[slot] = head.to(device)

    def train(self, mode: bool = True) -> "PromptedModel":
        """Switch prompts and heads; the backbone drops out in `Backbone.dropout` alone."""
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
        trunk: Trunk | None = None,
        prompt_keep: Mapping[int, Tensor] | None = None,
        first_token_only: bool = False,
        read_at: Tensor | None = None,
        recompute: bool = False,
        captured: list[Captured] | None = None,
    ) -> Encoded:
        """Run the backbone once for rows of any slots.

        Args:
            input_ids: `[B, T]`, padded on the right.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]`; None: all zero.
            slots: One slot for all rows, or `[B]` with a slot per row; -1 sees the bare backbone.
            trunk: Where to begin; None begins at the tokens.
            prompt_keep: What dropout leaves of a slot's prompt.
            first_token_only: Whether only the first token's states are wanted.
            read_at: `[B]`, each row's mask token, where a head reads it.
            recompute: Whether activations are computed again in the backward pass, not kept.
            captured: Where given, receives what every layer computed of the tokens.
        """
        backbone = self.backbone
        dtype = backbone.states_dtype
        gathered = self.bank.gather(slots, backbone.device, dtype, keep=prompt_keep)
        seen = token_mask
        if gathered.inputs is not None:
            before = token_mask.new_ones(len(token_mask), len(gathered.inputs))
            seen = torch.cat([before, token_mask], dim=1)  # [B, P + T]
        return backbone.encode(
            input_ids,
            token_mask,
            token_type_ids,
            shifts=gathered.shifts,
            prompts=PromptBatch.of(gathered.layers, seen, dtype, captured),
            inputs=gathered.inputs,
            trunk=trunk,
            # behind a prompt, the first token is not the first row of a layer's states
            first_token_only=first_token_only and gathered.inputs is None,
            read_at=read_at,
            recompute=recompute,
        )

    def answer(self, parts: Sequence[Part], *, recompute: bool = False) -> list[Tensor]:
        """Answer the rows of several slots in one forward.

        Args:
            parts: One for each slot that has rows. Only trunks of the same depth can be used.
            recompute: Whether activations are computed again in the backward pass, not kept.

        Returns:
            Each part's logits, `[B, C]` or `[B, T, C]`.
        """
        whole = _join(parts)
        heads = [self.heads[part.slot] for part in parts]
        slots: Tensor | int = parts[0].slot
        if len(parts) > 1:
            slots = torch.tensor([part.slot for part in parts for _ in range(len(part.input_ids))])
        encoded = self.encode(
            whole.input_ids,
            whole.token_mask,
            whole.token_type_ids,
            slots=slots,
            trunk=whole.trunk,
            prompt_keep={p.slot: p.prompt_keep for p in parts if p.prompt_keep is not None},
            first_token_only=self.trims_last_layer
            and all(reads_first_token(head.reads) for head in heads),  # type: ignore[arg-type]
            # texts of a template may be read by a head that needs no language model
            read_at=whole.read_at if any(head.reads == "mask" for head in heads) else None,
            recompute=recompute,
        )
        answers, start = [], 0
        for part, head in zip(parts, heads, strict=True):
            rows, width = part.input_ids.shape
            own = encoded if len(parts) == 1 else encoded.part(start, rows, width)
            answers.append(head(own, part.head_keep))
            start += rows
        return answers

    def forward(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        slot: int = 0,
        trunk: Trunk | None = None,
        read_at: Tensor | None = None,
    ) -> Tensor:
        """Return logits `[B, C]` or `[B, T, C]` of rows that all belong to one slot."""
        part = Part(
            slot=slot,
            input_ids=input_ids,
            token_mask=token_mask,
            token_type_ids=token_type_ids,
            trunk=trunk,
            read_at=read_at,
        )
        return self.answer([part])[0]

    def mixed(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        slots: Tensor,
        read_at: Tensor | None = None,
    ) -> list[Tensor]:
        """Answer rows of different tasks in one forward.

        Args:
            input_ids: `[B, T]`.
            token_mask: `[B, T]`, true at real tokens.
            token_type_ids: `[B, T]` or None.
            slots: `[B]`, each row's slot; -1 sees the bare backbone.
            read_at: `[B]`, the mask token of rows whose head reads it.

        Returns:
            For each row its slot's logits, `[C]` or `[T, C]`, and for a row without a slot the
            bare backbone's hidden states `[T, H]`.
        """
        encoded = self.encode(input_ids, token_mask, token_type_ids, slots=slots, read_at=read_at)
        results: list[Tensor] = [encoded.hidden[row] for row in range(len(slots))]
        for slot in sorted(set(slots.tolist()) - {NO_SLOT}):
            rows = (slots == slot).nonzero().flatten()
            logits = self.heads[slot](encoded.rows(rows.to(encoded.hidden.device)))
            for row, answer in zip(rows.tolist(), logits, strict=True):
                results[row] = answer
        return results


def _join(parts: Sequence[Part]) -> Part:
    """Put the rows of all parts under each other, padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.input_ids.shape[1] for part in parts)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        # [B, T] or [B, T, H] -> padded in T
        padded = [
            nn.functional.pad(one, (0, 0) * (one.dim() - 2) + (0, width - one.shape[1]))
            for one in tensors
        ]
        return torch.cat(padded)

    types = None
    if any(part.token_type_ids is not None for part in parts):
        types = joined(
            [
                torch.zeros_like(part.input_ids)
                if part.token_type_ids is None
                else part.token_type_ids
                for part in parts
            ]
        )
    trunk = None
    trunks = [part.trunk for part in parts if part.trunk is not None]
    if len(trunks) == len(parts) and len({one.num_layers for one in trunks}) == 1:
        hidden = joined([one.hidden for one in trunks])
        trunk = Trunk(hidden=hidden, num_layers=trunks[0].num_layers)
    read_at = None
    if any(part.read_at is not None for part in parts):
        read_at = torch.cat(
            [
                part.input_ids.new_zeros(len(part.input_ids)) if part.read_at is None
                else part.read_at
                for part in parts
            ]
        )  # fmt: skip
    return Part(
        slot=NO_SLOT,
        input_ids=joined([part.input_ids for part in parts]),
        token_mask=joined([part.token_mask for part in parts]),
        token_type_ids=types,
        trunk=trunk,
        read_at=read_at,
    )
