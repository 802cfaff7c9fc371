"""Heads: hidden states in, logits out.

Letters: B rows, T tokens, H hidden size, C classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ptv2_core.data.tasks import Form
from ptv2_core.model.backbones.base import Encoded, PooledReading

Reading = Literal["cls", "pooler", "mean", "last", "mask", "tokens"]


def read(encoded: Encoded, reads: Reading) -> Tensor:
    """Return what a head reads: `[B, H]`, or `[B, T, H]` for `tokens`.

    Args:
        encoded: The backbone's output.
        reads: The first token, the backbone's own pooler, the mean over real tokens, the last real
            token, the mask token after the language model's transform, or each token.
    """
    if reads == "tokens":
        return encoded.hidden
    if reads == "cls":
        return encoded.hidden[:, 0]
    if reads == "pooler":
        assert encoded.pooled is not None, "a backbone without a pooler is refused earlier"
        return encoded.pooled
    if reads == "mask":
        assert encoded.masked is not None, "whoever encodes for such a head says where it is"
        return encoded.masked
    if reads == "last":
        places = torch.arange(encoded.token_mask.shape[1], device=encoded.hidden.device)
        last = (places * encoded.token_mask).argmax(dim=1)  # [B]
        return encoded.hidden[torch.arange(len(last), device=last.device), last]
    weights = encoded.token_mask.to(encoded.hidden.dtype)[:, :, None]  # [B, T, 1]
    return (encoded.hidden * weights).sum(dim=1) / weights.sum(dim=1)


class LinearHead(nn.Module):
    """One linear layer over what `reads` names.

    Attributes:
        reads: What it reads.
        hides_padding: Whether padding gets the lowest logit there is, for a softmax over tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        *,
        reads: Reading,
        seed: int,
        hides_padding: bool = False,
    ) -> None:
        """Draw the layer from `seed`: N(0, 0.02) weights, zero bias, as encoders start theirs."""
        super().__init__()
        self.reads: Reading = reads
        self.hides_padding = hides_padding
        # not nn.Linear(): that would draw from the global random state
        self.linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, hidden_size, num_classes
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(0.0, 0.02, generator=generator)
            self.linear.bias.zero_()

    def start_at(self, weight: Tensor, bias: Tensor) -> None:
        """Begin with weight `[C, H]` and bias `[C]`."""
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)

    def forward(self, encoded: Encoded, keep: Tensor | None = None) -> Tensor:
        """Return logits `[B, C]`, or `[B, T, C]` where each token is read.

        Args:
            encoded: The backbone's output.
            keep: Of the shape of what is read: what dropout leaves of it; None leaves all.
        """
        states = read(encoded, self.reads)
        logits: Tensor = self.linear(states if keep is None else states * keep)
        if self.hides_padding:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~encoded.token_mask[:, :, None], lowest)
        return logits


def reads_first_token(reads: Reading) -> bool:
    """Tell whether a head reads nothing but what the first token gives."""
    return reads in ("cls", "pooler")


def reading_for(form: Form, reads: PooledReading | Literal["mask"]) -> Reading:
    """Return what a head of this form reads; one that answers tokens reads each of them."""
    return "tokens" if form in ("tokens", "spans") else reads
