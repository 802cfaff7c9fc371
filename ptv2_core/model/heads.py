"""Heads: hidden states in, logits out.

Letters: B rows, T tokens, H hidden size, C classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ptv2_core.data.tasks import TaskKind
from ptv2_core.model.backbones.base import Encoded

Reading = Literal["cls", "pooler", "mean", "tokens"]


def read(encoded: Encoded, reads: Reading) -> Tensor:
    """Return what a head reads: `[B, H]`, or `[B, T, H]` for `tokens`.

    Args:
        encoded: The backbone's output.
        reads: The first token, the backbone's own pooler, the mean over real tokens, or each token.
    """
    if reads == "tokens":
        return encoded.hidden
    if reads == "cls":
        return encoded.hidden[:, 0]
    if reads == "pooler":
        assert encoded.pooled is not None, "a backbone without a pooler is refused earlier"
        return encoded.pooled
    weights = encoded.token_mask.to(encoded.hidden.dtype)[:, :, None]  # [B, T, 1]
    return (encoded.hidden * weights).sum(dim=1) / weights.sum(dim=1)


class LinearHead(nn.Module):
    """One linear layer over what `reads` names."""

    def __init__(self, hidden_size: int, num_classes: int, *, reads: Reading, seed: int) -> None:
        """Draw the layer from `seed`: N(0, 0.02) weights, zero bias, as encoders start theirs."""
        super().__init__()
        self.reads: Reading = reads
        # not nn.Linear(): that would draw from the global random state
        self.linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, hidden_size, num_classes
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(0.0, 0.02, generator=generator)
            self.linear.bias.zero_()

    def forward(self, encoded: Encoded, keep: Tensor | None = None) -> Tensor:
        """Return logits `[B, C]`, or `[B, T, C]` where each token is read.

        Args:
            encoded: The backbone's output.
            keep: Of the shape of what is read: what dropout leaves of it; None leaves all.
        """
        states = read(encoded, self.reads)
        logits: Tensor = self.linear(states if keep is None else states * keep)
        return logits


def reads_first_token(reads: Reading) -> bool:
    """Tell whether a head reads nothing but what the first token gives."""
    return reads in ("cls", "pooler")


def reading_for(kind: TaskKind, reads: Literal["cls", "pooler", "mean"]) -> Reading:
    """Return what a head of this task kind reads; taggers always read each token."""
    return "tokens" if kind == "tagging" else reads
