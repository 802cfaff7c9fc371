"""The engine: takes rows, lets them wait, gives batches to processes, and brings back logits.

All of it runs on one event loop, which never waits for a process.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptv2_core.data.encoding import EncodedSplit
from ptv2_serving.answering import BusyError, DeadlineError, NotReadyError, ServingError
from ptv2_serving.engine.forward import BackboneChoice, Row
from ptv2_serving.engine.process import Host
from ptv2_serving.engine.waiting import Item, Waiting

# between the end of a process and its successor, so that one that cannot live is not a busy loop
RESTART_AFTER_S = 0.5
# of the latest batch in the running estimate of rows a second
RATE_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How rows become batches.

    Attributes:
        processes: That compute, at least 1.
        threads: Of each of them.
        token_budget: Padded tokens of a batch at most; a longer row stands alone.
        batch_rows: Rows of a batch at most.
        queue_rows: Rows that wait at most; beyond, requests are refused.
    """

    processes: int = 1
    threads: int = 1
    token_budget: int = 1024
    batch_rows: int = 64
    queue_rows: int = 2048


@dataclass(kw_only=True)
class Counts:
    """What the engine has done so far; see `EngineStatus`."""

    batches: int = 0
    rows: int = 0
    tasks: int = 0
    tokens: int = 0
    padded: int = 0
    restarts: int = 0


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


@dataclass(kw_only=True, eq=False)
class _Process:
    """One process that computes, as the engine sees it."""

    connection: Connection
    is_ready: bool = False
    batches: dict[int, list[Item]] = field(default_factory=dict)
    calls: dict[int, "asyncio.Future[Any]"] = field(default_factory=dict)


class Engine:
    """One frozen backbone in one or several processes, and the prompts resident on it."""

    def __init__(self, choice: BackboneChoice, config: EngineConfig) -> None:
        """Remember the settings; `start` begins."""
        self.config = config
        self.counts = Counts()
        self.backbone: dict[str, Any] = {}
        self.sizes: dict[int, int] = {}
        self._choice = choice
        self._waiting = Waiting(token_budget=config.token_budget, batch_rows=config.batch_rows)
        self._host: Host | None = None
        self._processes: list[_Process] = []
        self._resident: dict[int, Path] = {}
        self._alone: set[int] = set()
        self._users: Counter[int] = Counter()
        self._leaving: set[int] = set()
        self._free: list[int] = []
        self._numbers = count()
        self._slots = count()
        self._is_closing = False
        self._pumps = False
        self._rows_per_s = 0.0
        self._restarts: set[asyncio.Task[None]] = set()

    # What it holds

    @property
    def num_ready(self) -> int:
        """Processes that compute now."""
        return sum(process.is_ready for process in self._processes)

    @property
    def num_waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows that are being computed."""
        return sum(len(batch) for process in self._processes for batch in process.batches.values())

    async def start(self) -> None:
        """Load the backbone and start all processes.

        Raises:
            ServingError: The backbone is not there, or a process ended before it was ready.
        """
        await self._start_host()

    async def _start_host(self) -> None:
        loop = asyncio.get_running_loop()
        host = await loop.run_in_executor(
            None,
            lambda: Host(self._choice, threads=self.config.threads, name="ptv2-engine"),
        )
        self._host = host
        await self._join(host.first)
        is_forked = self.backbone["device"] == "cpu"
        for _ in range(self.config.processes - 1 if is_forked else 0):
            await self._join(host.fork())

    async def _join(self, connection: Connection) -> None:
        """Wait until a process is ready, tell it what is resident, and let it compute."""
        process = _Process(connection=connection)
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[Any] = loop.create_future()
        process.calls[-1] = ready
        self._processes.append(process)
        loop.add_reader(connection.fileno(), self._on_message, process)
        self.backbone = await ready
        await asyncio.gather(
            *(self._put_in(process, slot, path) for slot, path in self._resident.items())
        )
        process.is_ready = True
        self._pump()

    async def close(self) -> None:
        """End all processes; requests that still wait fail."""
        self._is_closing = True
        for task in list(self._restarts):
            task.cancel()
        for process in list(self._processes):
            self._lose(process)
        for item in list(self._waiting):
            item.request.fail(NotReadyError("the server is closing; ask again"))
            self._waiting.discard([item])
        if self._host is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._host.end)

    # Prompts

    async def put(self, folder: Path, *, alone: bool) -> int:
        """Load a verified prompt into all processes; return its slot.

        Args:
            folder: Holds its two files for as long as it is resident.
            alone: Whether its rows share a batch with no other prompt's.

        Raises:
            ServingError: It could not be loaded.
        """
        slot = self._free.pop() if self._free else next(self._slots)
        self._resident[slot] = folder
        if alone:
            self._alone.add(slot)
        try:
            sizes = await asyncio.gather(
                *(self._put_in(process, slot, folder) for process in self._processes)
            )
        except ServingError:
            self._forget(slot)
            raise
        self.sizes[slot] = sum(sizes)
        return slot

    async def _put_in(self, process: _Process, slot: int, folder: Path) -> int:
        try:
            size: int = await self._call(process, "put", slot, str(folder))
        except ConnectionError:
            return 0  # its successor is told before it computes
        return size

    def drop(self, slot: int) -> None:
        """Forget a prompt as soon as no request waits for it."""
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
        for process in self._processes:
            self._tell(process, ("drop", next(self._numbers), slot))
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        self._resident.pop(slot, None)
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
            BusyError: The queue is full.
            DeadlineError: `timeout_s` went by.
            NotReadyError: The engine is closing.
            ServingError: The rows cannot be computed.
        """
        if self._is_closing:
            raise NotReadyError("the server is closing; ask again")
        rows = _rows(split, slot)
        limit = self.config.queue_rows // 2 if yields else self.config.queue_rows
        # an idle queue takes any request, or one of more rows than the limit never had a chance
        if self._waiting and len(self._waiting) + len(rows) > limit:
            raise BusyError(
                f"{len(self._waiting)} rows wait already, {limit} at most; ask again later",
                retry_after_s=self._delay_s(),
            )
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

    def _delay_s(self) -> float:
        """Return about how long the rows that wait will take."""
        return min(max(len(self._waiting) / max(self._rows_per_s, 1.0), 0.1), 60.0)

    def _pump_soon(self) -> None:
        """Give out batches once all that arrived together is there."""
        if not self._pumps:
            self._pumps = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Give every process that has none a batch; and a second one if that would be full."""
        self._pumps = False
        while self._waiting:
            ready = [process for process in self._processes if process.is_ready]
            depth = 2 if self._waiting.is_full() else 1
            free = [process for process in ready if len(process.batches) < depth]
            if not free:
                return
            process = min(free, key=lambda one: len(one.batches))
            items = [item for item in self._waiting.take() if not item.request.done.done()]
            if items:
                self._give(process, items)

    def _give(self, process: _Process, items: list[Item]) -> None:
        number, now = next(self._numbers), time.monotonic()
        for item in items:
            if item.request.started_at is None:
                item.request.started_at = now
        process.batches[number] = items
        rows = [
            (item.row.slot, item.row.input_ids, item.row.token_type_ids, item.row.read_at)
            for item in items
        ]
        sizes = [item.tokens for item in items]
        self.counts.batches += 1
        self.counts.rows += len(items)
        self.counts.tasks += len({item.row.slot for item in items})
        self.counts.tokens += sum(sizes)
        self.counts.padded += max(sizes) * len(sizes)
        self._tell(process, ("run", number, rows))

    # Messages

    async def _call(self, process: _Process, kind: str, *arguments: Any) -> Any:
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        process.calls[number] = answer
        self._tell(process, (kind, number, *arguments))
        return await answer

    def _tell(self, process: _Process, message: tuple[Any, ...]) -> None:
        try:
            process.connection.send(message)
        except OSError:
            self._lose(process)

    def _on_message(self, process: _Process) -> None:
        try:
            message = process.connection.recv()
        except (EOFError, OSError):
            self._lose(process)
            return
        kind, number, *rest = message
        if kind == "ready":
            process.calls.pop(-1).set_result(rest[0] | {"pid": number})
        elif kind == "refused":
            process.calls.pop(-1).set_exception(ServingError(number))
        elif number in process.batches:
            items = process.batches.pop(number)
            if kind == "ran":
                self._deliver(items, rest[0])
            else:
                self._ask_again(items, rest[0])
            self._pump()
        elif number in process.calls:
            answer = process.calls.pop(number)
            if answer.done():
                return
            if kind == "failed":
                answer.set_exception(ServingError(rest[0]))
            else:
                answer.set_result(rest[0])

    def _deliver(self, items: Sequence[Item], logits: Sequence[Any]) -> None:
        now = time.monotonic()
        for item, own in zip(items, logits, strict=True):
            item.request.deliver(item.place, torch.from_numpy(own))
        started = items[0].request.started_at or now
        rate = len(items) / max(now - started, 1e-4) * self.num_ready
        self._rows_per_s += RATE_WEIGHT * (rate - self._rows_per_s)

    def _ask_again(self, items: Sequence[Item], problem: str) -> None:
        """Compute each row of a failed batch alone: one of them may be what is wrong.

        Processes can die together, each with rows that another one left. So a row may meet the end
        of as many as there are before it is what is wrong.
        """
        again = []
        for item in items:
            if item.attempts >= self.config.processes:
                item.request.fail(ServingError(f"the answer could not be computed: {problem}"))
            elif not item.request.done.done():
                again.append(replace(item, mixes=object(), attempts=item.attempts + 1))
        self._waiting.add(again, first=True)
        self._pump_soon()

    def _lose(self, process: _Process) -> None:
        """Forget a process that ended, compute its rows elsewhere, and start another."""
        if process not in self._processes:
            return
        self._processes.remove(process)
        asyncio.get_running_loop().remove_reader(process.connection.fileno())
        process.connection.close()
        was_ready, process.is_ready = process.is_ready, False
        for answer in process.calls.values():
            if not answer.done():
                error = (
                    ConnectionResetError("the process ended")
                    if was_ready
                    else ServingError("a process of the engine ended before it was ready")
                )
                answer.set_exception(error)
        for items in process.batches.values():
            self._ask_again(items, "the process that computed it ended")
        if was_ready and not self._is_closing:
            self.counts.restarts += 1
            task = asyncio.get_running_loop().create_task(self._restart())
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _restart(self) -> None:
        """Fork another process; where the one to fork from ended as well, load anew."""
        while not self._is_closing:
            await asyncio.sleep(RESTART_AFTER_S)
            host = self._host
            assert host is not None, "a process that was ready had one"
            try:
                if host.process.is_alive() and self.backbone["device"] == "cpu":
                    await self._join(host.fork())
                elif not self._processes:
                    await asyncio.get_running_loop().run_in_executor(None, host.end)
                    await self._start_host()
            except (OSError, ServingError):
                continue
            return


def _rows(split: EncodedSplit, slot: int) -> list[Row]:
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
