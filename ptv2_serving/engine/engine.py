"""The engine: takes rows, lets them wait, gives batches to processes, and brings back logits.

All of it runs on one event loop, which never waits for a process.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ptv2_core.data.encoding import EncodedSplit
from ptv2_serving.answering import (
    BusyError,
    DeadlineError,
    NotReadyError,
    ServingError,
    TooLongError,
)
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.engine.pool import Pool
from ptv2_serving.engine.requests import Computed, Request, Trial, rows_of
from ptv2_serving.engine.waiting import Item, Waiting, in_batches
from ptv2_serving.engine.worker import Worker

# of the latest batch in the running estimate of rows a second
RATE_WEIGHT = 0.1
TRIAL_TIMEOUT_S = 60.0
CLOSING = "the server is closing; ask again"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How rows become batches.

    Attributes:
        processes: That compute, at least 1.
        threads: Of each of them.
        token_budget: Padded tokens of a batch at most; a longer row stands alone.
        batch_rows: Rows of a batch at most.
        queue_rows: Rows that wait at most; beyond, requests are refused.
        request_rows: Rows of a request at most; one of more is refused for good.
    """

    processes: int = 1
    threads: int = 1
    token_budget: int = 1024
    batch_rows: int = 64
    queue_rows: int = 2048
    request_rows: int = 2048


@dataclass(kw_only=True)
class Counts:
    """What the engine has done so far; see `EngineStatus`."""

    batches: int = 0
    rows: int = 0
    tasks: int = 0
    tokens: int = 0
    padded: int = 0


class Engine:
    """One frozen backbone in one or several processes, and the prompts resident on it."""

    def __init__(self, choice: BackboneChoice, config: EngineConfig) -> None:
        """Remember the settings; `start` begins."""
        self.config = config
        self.counts = Counts()
        self.sizes: dict[int, int] = {}
        self.pool = Pool(choice, self, processes=config.processes, threads=config.threads)
        self._waiting = Waiting(token_budget=config.token_budget, batch_rows=config.batch_rows)
        self._resident: dict[int, Path] = {}
        self._alone: set[int] = set()
        self._users: Counter[int] = Counter()
        self._leaving: set[int] = set()
        self._free: list[int] = []
        self._slots = count()
        self._is_closing = False
        self._pumps = False
        self._rows_per_s = 0.0

    # What it holds

    @property
    def backbone(self) -> Mapping[str, Any]:
        """What its processes say of the backbone; empty before they are ready."""
        return self.pool.backbone

    @property
    def num_ready(self) -> int:
        """Processes that compute now."""
        return len(self.pool.ready)

    @property
    def num_waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows that are being computed."""
        batches = (worker.batches.values() for worker in self.pool.workers)
        return sum(len(batch) for own in batches for batch in own)

    def folders(self) -> Mapping[int, Path]:
        """Return the folder of each resident prompt, by slot."""
        return self._resident

    async def start(self) -> None:
        """Load the backbone and start all processes.

        Raises:
            ServingError: The backbone is not there, or a process ended before it was ready.
        """
        await self.pool.start()

    async def close(self) -> None:
        """End all processes; requests that still wait fail."""
        self._is_closing = True
        waiting = list(self._waiting)
        self._waiting.discard(waiting)
        for item in waiting:
            item.request.fail(NotReadyError(CLOSING))
        await self.pool.close()

    # Prompts

    async def put(self, folder: Path, *, alone: bool, trial: Trial | None = None) -> int:
        """Load a verified prompt into all processes; return its slot.

        Args:
            folder: Holds its two files for as long as it is resident, see `move`.
            alone: Whether its rows share a batch with no other prompt's.
            trial: Computed by every process before the slot is returned; it goes before all rows
                that wait.

        Raises:
            ServingError: It could not be loaded, or its trial not be computed.
            PTv2Error: What the trial's check raises. In each case nothing is left of the prompt.
        """
        slot = self._free.pop() if self._free else next(self._slots)
        self._resident[slot] = folder
        if alone:
            self._alone.add(slot)
        try:
            self.sizes[slot] = await self._put(slot, folder, trial)
        except BaseException:
            self.drop(slot)
            raise
        return slot

    async def _put(self, slot: int, folder: Path, trial: Trial | None) -> int:
        rows = [] if trial is None else rows_of(trial.split, slot)
        limits = {"token_budget": self.config.token_budget, "batch_rows": self.config.batch_rows}
        batches = [[row.to_tuple() for row in batch] for batch in in_batches(rows, **limits)]
        answers = await self.pool.call_all("put", slot, str(folder), batches)
        if trial is not None:
            for _, logits in answers:
                trial.check([torch.from_numpy(own) for own in logits])
            if not answers:
                # all processes ended just now: their successors have the prompt, and are asked
                computed = await self.compute(slot, trial.split, timeout_s=TRIAL_TIMEOUT_S)
                trial.check(computed.logits)
        return sum(size for size, _ in answers)

    def move(self, slot: int, folder: Path) -> None:
        """Say where a resident prompt's files lie now, for processes that start later."""
        if slot in self._resident:
            self._resident[slot] = folder

    def drop(self, slot: int) -> None:
        """Forget a prompt as soon as no request waits for it; nothing where there is none."""
        if slot in self._resident:
            self._leaving.add(slot)
            self._sweep(slot)

    @contextmanager
    def held(self, slot: int) -> Iterator[None]:
        """Keep a prompt until the end, dropped or not, so that its slot is nobody else's."""
        self._users[slot] += 1
        try:
            yield
        finally:
            self._users[slot] -= 1
            self._sweep(slot)

    def _sweep(self, slot: int) -> None:
        if slot not in self._leaving or self._users[slot]:
            return
        self._leaving.discard(slot)
        self.pool.tell_all("drop", slot)
        self._resident.pop(slot)
        self.sizes.pop(slot, None)
        self._alone.discard(slot)
        self._users.pop(slot, None)
        self._free.append(slot)

    # Rows

    async def compute(
        self, slot: int, split: EncodedSplit, *, timeout_s: float, yields: bool = False
    ) -> Computed:
        """Return the logits of rows.

        Cancelling the call takes its rows from the queue.

        Args:
            slot: Whose prompt answers them.
            split: The rows.
            timeout_s: When to give up.
            yields: Whether to give way: refused as soon as half of the queue is taken.

        Raises:
            TooLongError: They are more than a request may have.
            BusyError: The queue is full.
            DeadlineError: `timeout_s` went by.
            NotReadyError: The engine is closing.
            ServingError: The rows cannot be computed.
        """
        if self._is_closing:
            raise NotReadyError(CLOSING)
        self.check_room(len(split), yields=yields)
        rows = rows_of(split, slot)
        if not rows:
            return Computed(logits=[], queued_s=0.0, computed_s=0.0)
        request = Request(len(rows), asyncio.get_running_loop().create_future())
        mixes = slot if slot in self._alone else None
        items = [
            Item(row=row, place=place, request=request, mixes=mixes)
            for place, row in enumerate(rows)
        ]
        self._users[slot] += 1
        self._waiting.add(items)
        self._pump_soon()
        try:
            async with asyncio.timeout(timeout_s):
                await request.done
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s:g} s; ask again later") from error
        finally:
            if request.missing:
                self._waiting.forget(request)
            self._users[slot] -= 1
            self._sweep(slot)
        now = time.monotonic()
        started = request.started_at or now
        return Computed(
            logits=[own for own in request.logits if own is not None],
            queued_s=started - request.taken_at,
            computed_s=now - started,
        )

    def check_room(self, rows: int, *, coming: int = 0, yields: bool = False) -> None:
        """Refuse rows that nobody could wait for.

        Args:
            rows: How many, at least.
            coming: Rows of requests that were taken and do not wait here yet.
            yields: As for `compute`.

        Raises:
            TooLongError: They are more than a request may have.
            BusyError: The queue is full.
        """
        if rows > self.config.request_rows:
            raise TooLongError(
                f"expected at most {self.config.request_rows:,} rows in a request (texts, choices, "
                f"or windows of a context), got {rows:,}; ask in several requests"
            )
        limit = self.config.queue_rows // 2 if yields else self.config.queue_rows
        taken = len(self._waiting) + coming
        # an idle queue takes any request, or one of more rows than the limit never had a chance
        if taken and taken + rows > limit:
            raise BusyError(
                f"{taken} rows wait already, {limit} at most; ask again later",
                retry_after_s=self._delay_s(),
            )

    def _delay_s(self) -> float:
        """Return about how long the rows that wait will take."""
        return min(max(len(self._waiting) / max(self._rows_per_s, 1.0), 0.1), 60.0)

    def _pump_soon(self) -> None:
        """Give out batches once all that arrived together is there."""
        if not self._pumps:
            self._pumps = True
            asyncio.get_running_loop().call_soon(self.on_free)

    def on_free(self) -> None:
        """Give every process that has none a batch; and a second one if that would be full."""
        self._pumps = False
        while self._waiting:
            depth = 2 if self._waiting.is_full() else 1
            free = [worker for worker in self.pool.ready if len(worker.batches) < depth]
            if not free:
                return
            worker = min(free, key=lambda one: len(one.batches))
            items = [item for item in self._waiting.take() if not item.request.done.done()]
            if items:
                self._give(worker, items)

    def _give(self, worker: Worker, items: list[Item]) -> None:
        now = time.monotonic()
        for item in items:
            if item.request.started_at is None:
                item.request.started_at = now
        sizes = [item.tokens for item in items]
        self.counts.batches += 1
        self.counts.rows += len(items)
        self.counts.tasks += len({item.row.slot for item in items})
        self.counts.tokens += sum(sizes)
        self.counts.padded += max(sizes) * len(sizes)
        self.pool.give(worker, items)

    def on_logits(self, items: Sequence[Item], logits: Sequence[Any]) -> None:
        """Deliver a batch; None stands for a row whose prompt the process does not hold."""
        now = time.monotonic()
        for item, own in zip(items, logits, strict=True):
            if own is None:
                problem = "a process of the engine lacks its prompt; the server's log says why"
                item.request.fail(ServingError(f"the answer could not be computed: {problem}"))
            else:
                item.request.deliver(item.place, torch.from_numpy(own))
        started = items[0].request.started_at or now
        rate = len(items) / max(now - started, 1e-4) * self.num_ready
        self._rows_per_s += RATE_WEIGHT * (rate - self._rows_per_s)

    def on_failed(self, items: Sequence[Item], problem: str) -> None:
        """Compute each row of a failed batch alone: one of them may be what is wrong.

        Processes can die together, each with rows that another one left. So a row may meet the end
        of as many as there are before it is what is wrong.
        """
        again = []
        for item in items:
            if self._is_closing:
                item.request.fail(NotReadyError(CLOSING))
            elif item.attempts >= self.config.processes:
                item.request.fail(ServingError(f"the answer could not be computed: {problem}"))
            elif not item.request.done.done():
                again.append(replace(item, mixes=object(), attempts=item.attempts + 1))
        self._waiting.add(again, first=True)
        self._pump_soon()
