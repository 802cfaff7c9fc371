"""Several processes that train one model on shares of every batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes that train together; they must already be in torch's process group.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange.

        Args:
            tensors: Of one device; the same shapes in every process.
        """
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            part = flat[start : start + tensor.numel()]
            tensor.detach().copy_(part.view_as(tensor))
            start += tensor.numel()

    def wait(self) -> None:
        """Wait until every process is here."""
        dist.barrier()
