"""One backbone with the prompts that are resident on it: rows of any of them in, logits out.

Letters: B rows, T tokens, H hidden size, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptv2_core.artifact import load_weights, restore_model
from ptv2_core.config import Device, Precision
from ptv2_core.manifest import load_manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import choose_device, load_backbone, num_cards
from ptv2_core.model.heads import LinearHead, read, reads_first_token
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import NoPrompt, PromptBank

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class BackboneChoice:
    """Which backbone to load, and how.

    Attributes:
        name: As for `ptv2_core.model.backbones.locating.locate`.
        revision: Likewise.
        digest: It must have.
        device: Where it runs.
        precision: Number format of the frozen weights.
        language_model: Whether a head reads the mask token.
    """

    name: str
    revision: str | None
    digest: str
    device: Device
    precision: Precision
    language_model: bool

    @property
    def num_cards(self) -> int:
        """GPUs that it may be on; 0: it is on the CPU.

        Raises:
            BackboneError: The device is not on this machine.
        """
        return num_cards(self.device)

    def load(self, card: int | None = None) -> Backbone:
        """Load it.

        Args:
            card: Number of the GPU, which becomes the one of this thread; None: the CPU.

        Raises:
            BackboneError: It is not there or is another one.
        """
        if card is not None and choose_device(self.device).type == "cuda":
            torch.cuda.set_device(card)
        return load_backbone(
            self.name,
            self.revision,
            digest=self.digest,
            device=self.device,
            precision=self.precision,
            language_model=self.language_model,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """What the backbone reads at once, and whose prompt it is answered with.

    Attributes:
        slot: Of the prompt.
        input_ids: `[T]`.
        token_type_ids: `[T]`, or None where all are zero.
        read_at: The mask token's place, for a head that reads it; -1: none.
    """

    slot: int
    input_ids: IntArray
    token_type_ids: IntArray | None
    read_at: int

    def to_tuple(self) -> tuple[Any, ...]:
        """Return what a message holds of it."""
        return self.slot, self.input_ids, self.token_type_ids, self.read_at


class Forward:
    """Answers batches. A slot that is dropped is used again; its number is the caller's choice."""

    def __init__(self, backbone: Backbone) -> None:
        """Begin without a prompt."""
        self.backbone = backbone
        self._model = PromptedModel(backbone, PromptBank(backbone.spec.shape), [])
        self._model.eval()
        self._held: set[int] = set()

    def put(self, slot: int, folder: Path) -> int:
        """Load a prompt that was verified before; return the bytes that it takes.

        Raises:
            ArtifactError: The files are not what they were.
        """
        manifest = load_manifest(folder)
        weights = load_weights(folder, manifest)
        single = restore_model(
            self.backbone, [(manifest.task, manifest.prompt, manifest.head, weights)]
        )
        prompt = single.bank.slots[0].to(self.backbone.dtype).requires_grad_(False)
        head = single.heads[0].requires_grad_(False)
        assert isinstance(head, LinearHead), "an artifact has a linear head"
        while len(self._model.heads) < slot:
            self._fill(len(self._model.heads))
        self._model.put(slot, prompt, manifest.prompt, head)
        self._held.add(slot)
        parts = [*prompt.parameters(), *head.parameters()]
        return sum(part.numel() * part.element_size() for part in parts)

    def drop(self, slot: int) -> None:
        """Forget a slot's prompt, if it has one."""
        if slot in self._held:
            self._held.discard(slot)
            self._fill(slot)

    def holds(self, slot: int) -> bool:
        """Tell whether a slot has a prompt."""
        return slot in self._held

    def _fill(self, slot: int) -> None:
        from ptv2_core.config import PromptConfig

        empty = LinearHead(1, 1, reads="cls", seed=0)
        self._model.put(slot, NoPrompt(), PromptConfig(), empty)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[npt.NDArray[np.float32]]:
        """Return each row's logits, `[C]` or `[T, C]`."""
        device = self.backbone.device
        lengths = [len(row.input_ids) for row in rows]
        width = max(lengths)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        types = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : lengths[place]] = row.input_ids
            if row.token_type_ids is not None:
                types[place, : lengths[place]] = row.token_type_ids
        sizes = torch.tensor(lengths, device=device)
        slots = [row.slot for row in rows]
        heads: list[Any] = [self._model.heads[slot] for slot in slots]
        reads_mask = any(head.reads == "mask" for head in heads)
        read_at = torch.tensor([max(row.read_at, 0) for row in rows], device=device)
        encoded = self._model.encode(
            torch.from_numpy(ids).to(device),
            torch.arange(width, device=device)[None, :] < sizes[:, None],
            torch.from_numpy(types).to(device) if types.any() else None,
            slots=slots[0] if len(set(slots)) == 1 else torch.tensor(slots),
            first_token_only=all(reads_first_token(head.reads) for head in heads),
            read_at=read_at if reads_mask else None,
        )
        states = {kind: read(encoded, kind) for kind in {head.reads for head in heads}}
        return [
            _logits(head, states[head.reads][place], length)
            for place, (head, length) in enumerate(zip(heads, lengths, strict=True))
        ]


def _logits(head: LinearHead, states: Tensor, length: int) -> npt.NDArray[np.float32]:
    """Return `[C]` for states `[H]`, or `[T, C]` for `[width, H]` without the padding."""
    own = states if states.dim() == 1 else states[:length]
    found: npt.NDArray[np.float32] = head.linear(own).cpu().numpy()
    return found
