"""What the engine is asked, and what it answers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ptv2_core.data.encoding import EncodedSplit
from ptv2_serving.answering import ServingError
from ptv2_serving.engine.forward import Row


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a request's rows gave.

    Attributes:
        logits: Of each row, `[C]` or `[T, C]`.
        queued_s: How long the first row waited.
        computed_s: From then to the last row's logits.
    """

    logits: Sequence[Tensor]
    queued_s: float
    computed_s: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Rows that every process computes as soon as it holds a prompt, before anybody asks.

    Attributes:
        split: The rows.
        check: Takes the logits of each, and raises where they are not what they should be.
    """

    split: EncodedSplit
    check: Callable[[Sequence[Tensor]], None]


class Request:
    """Rows whose logits somebody waits for."""

    def __init__(self, rows: int, done: "asyncio.Future[None]") -> None:
        """Expect so many rows; `missing` of them are not there yet."""
        self.done = done
        self.logits: list[Tensor | None] = [None] * rows
        self.taken_at = time.monotonic()
        self.started_at: float | None = None
        self.missing = rows

    def deliver(self, place: int, logits: Tensor) -> None:
        """Take a row's logits; the last ends the wait."""
        if self.done.done():
            return
        self.logits[place] = logits
        self.missing -= 1
        if not self.missing:
            self.done.set_result(None)

    def fail(self, error: ServingError) -> None:
        """End the wait with an error."""
        if not self.done.done():
            self.done.set_exception(error)


def rows_of(split: EncodedSplit, slot: int) -> list[Row]:
    """Return a split's rows, each with arrays of its own."""
    edges = split.offsets.tolist()
    has_types = bool(split.token_type_ids.any())
    return [
        Row(
            slot,
            split.input_ids[start:end],
            split.token_type_ids[start:end] if has_types else None,
            int(split.read_at[place]) if len(split.read_at) else -1,
        )
        for place, (start, end) in enumerate(zip(edges, edges[1:], strict=False))
    ]
