"""The processes that compute, as the event loop sees them: started, spoken to, started again."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from typing import Any

from ptv2_core.errors import BackboneError
from ptv2_serving.answering import ServingError
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.engine.process import Host
from ptv2_serving.engine.waiting import Item
from ptv2_serving.engine.worker import Owner, Worker

LOG = logging.getLogger(__name__)
# between the end of a process and its successor, so that one that cannot live is not a busy loop
RESTART_AFTER_S = 0.5


class Pool:
    """All processes. One that ends is replaced, and its rows go back to their owner.

    Attributes:
        backbone: What the latest process said of it.
        workers: Those that live, the ones that are not ready yet too.
        restarts: How many ended after they had been ready.
        host: The process that the others are forked from; None on GPUs.
    """

    def __init__(
        self, choice: BackboneChoice, owner: Owner, *, processes: int, threads: int
    ) -> None:
        """Start nothing yet.

        Args:
            choice: The backbone.
            owner: Is told what happens.
            processes: How many there should be; on GPUs each is on the next card, and
                beyond their number again on the first.
            threads: Of each.
        """
        self.backbone: dict[str, Any] = {}
        self.workers: list[Worker] = []
        self.restarts = 0
        self.host: Host | None = None
        self._choice = choice
        self._owner = owner
        self._processes = processes
        self._cards = 0
        self._on_card: Counter[int] = Counter()
        self._failed_on: Counter[int] = Counter()
        self._ending: set[asyncio.Future[None]] = set()
        self._threads = threads
        self._numbers = count()
        self._is_started = False
        self._is_closing = False
        self._mending: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> list[Worker]:
        """Those that compute now."""
        return [worker for worker in self.workers if worker.is_ready]

    @property
    def _reading(self) -> list[Worker]:
        """Those that read what they are sent.

        One that still loads does not: it would hold up whoever sends, and gets all prompts later.
        """
        return [worker for worker in self.workers if worker.pid is not None]

    async def start(self) -> None:
        """Load the backbone and start all processes.

        Raises:
            ServingError: The backbone is not there, or a process ended before it was ready.
        """
        try:
            self._cards = self._choice.num_cards
            if self._cards:
                await self._add_on_cards()
            else:
                for _ in range(self._processes):
                    await self._add_forked()
        except BackboneError as error:
            raise ServingError(str(error)) from error
        except OSError as error:
            raise ServingError(f"a process of the engine could not start: {error}") from error
        self._is_started = True
        self._mend()

    async def close(self) -> None:
        """End all processes."""
        self._is_closing = True
        mending = list(self._mending)
        for task in mending:
            task.cancel()
        await asyncio.gather(*mending, return_exceptions=True)
        for worker in list(self.workers):
            self._lose(worker)
        if self.host is not None:
            self._end_later(self.host)
        await asyncio.gather(*self._ending)

    def _end_later(self, host: Host) -> "asyncio.Future[None]":
        """End a process that loaded the backbone; it may take its time.

        Returns:
            What may be awaited and cancelled; the process is ended all the same.
        """
        ending = asyncio.get_running_loop().run_in_executor(None, host.end)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return asyncio.shield(ending)

    # Starting

    async def _add_on_cards(self) -> None:
        """Start all processes at once: each loads the backbone, for as long as one would."""
        adding = [self._add_on_card() for _ in range(self._processes)]
        for found in await asyncio.gather(*adding, return_exceptions=True):
            if found is not None:
                raise found

    async def _add_on_card(self) -> None:
        """Start a process on the card that has the fewest; of several, one that is not broken.

        Raises:
            ServingError: It ended before it was ready.
            OSError: It could not be started.
        """
        card = min(
            range(self._cards), key=lambda one: (self._on_card[one], self._failed_on[one], one)
        )
        self._on_card[card] += 1
        self._failed_on[card] += 1  # until it is ready
        try:
            host = await self._load(f"ptv2-engine-{card}", card)
        except BaseException:
            self._on_card[card] -= 1
            raise
        await self._join(Worker(connection=host.first, host=host, card=card))
        del self._failed_on[card]

    async def _add_forked(self) -> None:
        """Start a process; where there is none to fork it from, load the backbone first.

        Raises:
            ServingError: It ended before it was ready.
            OSError: The process to fork from has just ended.
        """
        host = self.host
        if host is not None and host.process.is_alive():
            await self._join(Worker(connection=host.fork()))
            return
        if host is not None:
            # its children go on by themselves
            await self._end_later(host)
        self.host = await self._load("ptv2-engine", None)
        await self._join(Worker(connection=self.host.first))

    async def _load(self, name: str, card: int | None) -> Host:
        loading = asyncio.get_running_loop().run_in_executor(
            None, lambda: Host(self._choice, threads=self._threads, name=name, card=card)
        )
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            # a thread cannot be stopped: what it starts is ended
            with suppress(OSError):
                self._end_later(await loading)
            raise

    async def _join(self, worker: Worker) -> None:
        """Wait until a process is ready, give it all prompts, and let it compute."""
        loop = asyncio.get_running_loop()
        ready = worker.calls[-1] = loop.create_future()
        self.workers.append(worker)
        loop.add_reader(worker.connection.fileno(), self._on_message, worker)
        try:
            worker.pid, backbone = await ready
            self._check_alike(backbone)
            self.backbone = backbone
            await self._fill(worker)
        except BaseException:
            self._lose(worker)
            raise
        worker.is_ready = True
        self._owner.on_free()

    def _check_alike(self, backbone: Mapping[str, Any]) -> None:
        """Refuse a card that would answer otherwise than the others.

        Raises:
            ServingError: It computes in another number format.
        """
        known = self.backbone.get("precision", backbone["precision"])
        if backbone["precision"] != known:
            raise ServingError(
                f"the GPUs are not alike: one computes in {known}, another in "
                f"{backbone['precision']}; choose one for all with --precision, or the cards with "
                "CUDA_VISIBLE_DEVICES"
            )

    async def _fill(self, worker: Worker) -> None:
        """Give a process all prompts in one message: with many, it and we would wait for ever.

        It would not read any more before its answers are read, and we not before ours is sent.
        """
        missing: Mapping[int, str] = dict.fromkeys(self._owner.folders(), "")
        # twice: a prompt may have been renamed into the store meanwhile
        for _ in range(2):
            folders = [
                (slot, str(folder))
                for slot, folder in self._owner.folders().items()
                if slot in missing
            ]
            if not folders:
                return
            missing = await self.call(worker, "fill", folders)
        for slot, problem in missing.items():
            if slot in self._owner.folders():
                LOG.error("a process of the engine lacks a prompt: %s", problem)

    def _mend(self) -> None:
        """Start what is missing: one process after another, on GPUs side by side.

        A card that is broken, or never gets ready, then keeps nobody from mending the others.
        """
        if not self._is_started or self._is_closing:
            return
        missing = self._processes - len(self.ready)
        wanted = missing if self._cards else min(missing, 1)
        for _ in range(wanted - len(self._mending)):
            task = asyncio.get_running_loop().create_task(self._restart())
            self._mending.add(task)
            task.add_done_callback(self._mended)

    def _mended(self, task: "asyncio.Task[None]") -> None:
        self._mending.discard(task)
        self._mend()

    async def _restart(self) -> None:
        """Start a process, however often that takes."""
        while True:
            await asyncio.sleep(RESTART_AFTER_S)
            try:
                await (self._add_on_card() if self._cards else self._add_forked())
            except (OSError, ServingError) as error:
                LOG.warning("a process of the engine could not be started again: %s", error)
            else:
                return

    def _lose(self, worker: Worker) -> None:
        """Forget a process that ended, give its rows back, and see to another."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        asyncio.get_running_loop().remove_reader(worker.connection.fileno())
        worker.connection.close()
        if worker.card is not None:
            self._on_card[worker.card] -= 1
        if worker.host is not None:
            self._end_later(worker.host)
        was_ready, worker.is_ready = worker.is_ready, False
        for answer in worker.calls.values():
            if not answer.done():
                error = (
                    ConnectionResetError("the process ended")
                    if was_ready
                    else ServingError("a process of the engine ended before it was ready")
                )
                answer.set_exception(error)
        for items in worker.batches.values():
            self._owner.on_failed(items, "the process that computed it ended")
        if was_ready and not self._is_closing:
            LOG.warning("process %s of the engine ended; another one is started", worker.pid)
            self.restarts += 1
            self._mend()

    # Messages

    async def call(self, worker: Worker, kind: str, *arguments: Any) -> Any:
        """Ask a process, and return its answer.

        Raises:
            ServingError: It says that it could not.
            ConnectionError: It ended.
        """
        if worker not in self.workers:
            raise ConnectionResetError("the process ended")
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        worker.calls[number] = answer
        self._tell(worker, (kind, number, *arguments))
        return await answer

    async def call_all(self, kind: str, *arguments: Any) -> list[Any]:
        """Ask all processes, and return the answers of those that compute and still live.

        Those that have the backbone and are not ready yet are told, and nobody waits for them.

        Raises:
            ServingError: One says that it could not.
        """
        ready = self.ready
        for worker in self._reading:
            if not worker.is_ready:
                self._tell(worker, (kind, next(self._numbers), *arguments))
        calls = [self._call_living(worker, kind, *arguments) for worker in ready]
        return [answer for answer in await asyncio.gather(*calls) if answer is not None]

    async def _call_living(self, worker: Worker, kind: str, *arguments: Any) -> Any:
        try:
            return await self.call(worker, kind, *arguments)
        except ConnectionError:
            return None  # its successor is filled before it computes

    def tell_all(self, kind: str, *arguments: Any) -> None:
        """Tell all processes something that has no answer of use."""
        for worker in self._reading:
            self._tell(worker, (kind, next(self._numbers), *arguments))

    def give(self, worker: Worker, items: list[Item]) -> None:
        """Give a process a batch."""
        number = next(self._numbers)
        worker.batches[number] = items
        self._tell(worker, ("run", number, [item.row.to_tuple() for item in items]))

    def _tell(self, worker: Worker, message: tuple[Any, ...]) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            self._lose(worker)

    def _on_message(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker)
            return
        kind, number, *rest = message
        if kind == "ready":
            worker.calls.pop(-1).set_result((number, rest[0]))
        elif kind == "refused":
            worker.calls.pop(-1).set_exception(ServingError(number))
        elif number in worker.batches:
            items = worker.batches.pop(number)
            if kind == "ran":
                self._owner.on_logits(items, rest[0])
            else:
                self._owner.on_failed(items, rest[0])
            self._owner.on_free()
        elif number in worker.calls:
            answer = worker.calls.pop(number)
            if answer.done():
                return
            if kind == "failed":
                answer.set_exception(ServingError(rest[0]))
            else:
                answer.set_result(rest[0])
