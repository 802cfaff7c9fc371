"""The rows that wait, and which of them make the next batch."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ptv2_serving.engine.forward import Row

if TYPE_CHECKING:
    from ptv2_serving.engine.requests import Request

# how many of the longest waiting rows are looked at for a batch
LOOKED_AT = 512


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One row of one request.

    Attributes:
        row: What is computed.
        place: Of the row in its request.
        request: Whose row it is.
        mixes: Rows may share a batch where this is equal: most prompts mix with all others, one
            before the lowest layer with its own rows alone.
        attempts: How many batches failed with it so far.
    """

    row: Row
    place: int
    request: "Request"
    mixes: Hashable = None
    attempts: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return len(self.row.input_ids)


class Waiting:
    """Rows in order of arrival. A batch begins with the one that has waited longest.

    It is filled up with rows of about the same length, so that little padding is computed; a row
    that is passed over comes nearer to the front each time, and so is never starved.
    """

    def __init__(self, *, token_budget: int, batch_rows: int) -> None:
        """Take the limits of a batch.

        Args:
            token_budget: Padded tokens at most; a longer row stands alone.
            batch_rows: Rows at most.
        """
        self._items: OrderedDict[Item, None] = OrderedDict()
        self._token_budget = token_budget
        self._batch_rows = batch_rows

    def __len__(self) -> int:
        """Return how many rows wait."""
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        """Yield the rows, longest wait first."""
        return iter(self._items)

    def add(self, items: Sequence[Item], *, first: bool = False) -> None:
        """Let rows wait: behind all others, or before them."""
        for item in items:
            self._items[item] = None
        if first:
            for item in reversed(items):
                self._items.move_to_end(item, last=False)

    def discard(self, items: Sequence[Item]) -> None:
        """Forget rows, if they wait."""
        for item in items:
            self._items.pop(item, None)

    def forget(self, request: "Request") -> None:
        """Forget all rows of a request."""
        self.discard([item for item in self._items if item.request is request])

    def is_full(self) -> bool:
        """Tell whether there are enough rows for a batch that has no room left."""
        if len(self._items) >= self._batch_rows:
            return True
        return sum(item.tokens for item in self._items) >= self._token_budget

    def take(self) -> list[Item]:
        """Return the rows of the next batch, which wait no longer; none if none waits."""
        if not self._items:
            return []
        oldest = next(iter(self._items))
        near = [item for item in islice(self._items, LOOKED_AT) if item.mixes == oldest.mixes]
        # a stable sort: of rows of one length, the longest wait goes first
        near.sort(key=lambda item: abs(item.tokens - oldest.tokens))
        batch, longest = [oldest], oldest.tokens
        for item in near:
            if len(batch) == self._batch_rows:
                break
            if item is oldest:
                continue
            width = max(longest, item.tokens)
            if width * (len(batch) + 1) > self._token_budget:
                continue
            batch.append(item)
            longest = width
        self.discard(batch)
        return batch


def in_batches(rows: Sequence[Row], *, token_budget: int, batch_rows: int) -> list[list[Row]]:
    """Return rows as batches in their order; limits as for `Waiting`."""
    batches: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.input_ids))
        is_room = batches and len(batches[-1]) < batch_rows
        if is_room and longest * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = len(row.input_ids)
    return batches
