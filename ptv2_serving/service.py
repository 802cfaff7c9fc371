"""The service behind HTTP: which prompt answers a request, and what is counted of it."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptv2_core.errors import DataError
from ptv2_serving.answering import (
    Answer,
    EngineStatus,
    NotReadyError,
    Role,
    ServingError,
    TaskStatus,
    UnknownTaskError,
)
from ptv2_serving.asking import Asker
from ptv2_serving.engine.engine import Engine
from ptv2_serving.following import Follower, Wishes
from ptv2_serving.guard import Limits, verdict
from ptv2_serving.loading import Loader, example_of
from ptv2_serving.routes import Resident, Route
from ptv2_serving.routing import Routing

# what two answers to one input are compared by
COMPARED = ("label", "tags", "choice", "text", "value")
# numbers that are closer than this are one answer
VALUE_TOLERANCE = 1e-2
# requests that shadows are asked side by side; of more, some are not compared
MAX_SHADOWS = 32


class PromptService:
    """One backbone, many prompts. Everything here runs on one event loop.

    A request is bound to one resident prompt when it comes, so a swap while it waits changes
    nothing for it.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        wishes: Wishes,
        *,
        tasks: Sequence[str] | None,
        warm: int = 1,
        limits: Limits | None = None,
    ) -> None:
        """Serve nothing yet.

        Args:
            engine: That has been started.
            loader: Fetches and verifies prompts.
            wishes: The registry.
            tasks: To serve; None: all that the registry has.
            warm: Earlier prompts of each task that stay loaded.
            limits: What a canary may do worse than the champion.
        """
        self._engine = engine
        self._asker = Asker(engine)
        self._follower = Follower(engine, loader, wishes, tasks=tasks, warm=warm)
        self._limits = limits or Limits()
        self._is_draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._shadows: set[asyncio.Task[None]] = set()
        self._looks: set[asyncio.Task[list[str]]] = set()
        self._compared: dict[str, tuple[int, int]] = {}

    # Asking

    async def predict(
        self,
        task: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        request_id: str,
        timeout_s: float,
        version: int | None = None,
        refuse_long: bool = False,
    ) -> Answer:
        """Answer inputs with one prompt; see `ptv2_serving.answering.Service`."""
        if self._is_draining:
            raise NotReadyError("the server is closing; ask again")
        route = self._follower.routes.get(task)
        if route is None:
            raise UnknownTaskError(self._unknown(task))
        resident, role = route.choose(request_id, version)
        self._in_flight += 1
        self._idle.clear()
        try:
            answer = await self._asker.ask(
                resident, role, inputs, timeout_s, refuse_long=refuse_long
            )
        except ServingError as error:
            self._judge(task, route, role, 0.0, failed=_is_fault(error))
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
        self._judge(task, route, role, answer.queued_s + answer.computed_s, failed=False)
        is_room = len(self._shadows) < MAX_SHADOWS
        if route.shadow is not None and role == "champion" and version is None and is_room:
            asking = asyncio.get_running_loop().create_task(
                self._shadow(task, route.shadow, inputs, answer, timeout_s)
            )
            self._shadows.add(asking)
            asking.add_done_callback(self._shadows.discard)
        return answer

    def _unknown(self, task: str) -> str:
        loaded = ", ".join(sorted(self._follower.routes)[:20]) or "none"
        problems = self.problems()
        problem = f" {problems[task]}" if task in problems else ""
        return f"no prompt for the task {task[:64]!r} is loaded; loaded are: {loaded}.{problem}"

    def _judge(self, task: str, route: Route, role: Role, seconds: float, *, failed: bool) -> None:
        """Remember how a request went, and take a canary back that does too badly."""
        if route.canary is None or role == "shadow":
            return
        route.records[role].add(seconds, failed=failed)
        reason = verdict(route.records["champion"], route.records["canary"], self._limits)
        if role == "canary" and reason is not None and self._follower.routes.get(task) is route:
            self._follower.take_back(task, route, reason)

    async def _shadow(
        self,
        task: str,
        shadow: Resident,
        inputs: Sequence[Mapping[str, Any]],
        answer: Answer,
        timeout_s: float,
    ) -> None:
        """Ask the shadow what the champion was asked, when there is room, and count differences."""
        route = self._follower.routes.get(task)
        if route is None or route.shadow is not shadow:
            return  # it was swapped out before this began
        try:
            other = await self._asker.ask(shadow, "shadow", inputs, timeout_s, yields=True)
        except (ServingError, DataError):
            return
        different = sum(
            not agrees(one, two)
            for one, two in zip(answer.predictions, other.predictions, strict=True)
        )
        compared, so_far = self._compared.get(task, (0, 0))
        self._compared[task] = (compared + len(inputs), so_far + different)

    # What is loaded

    def tasks(self) -> list[TaskStatus]:
        """Return what is loaded, by task name."""
        problems = self.problems()
        return [
            TaskStatus(
                spec=route.champion.manifest.task,
                champion=route.champion.id,
                canary=route.canary.id if route.canary else None,
                canary_share=route.canary_share,
                shadow=route.shadow.id if route.shadow else None,
                warm=[resident.id for resident in route.warm],
                max_length=route.champion.codec.max_length,
                example=example_of(route.champion.manifest),
                problem=problems.get(task),
            )
            for task, route in sorted(self._follower.routes.items())
        ]

    def problems(self) -> dict[str, str]:
        """Return why tasks are not served, or not as the registry wishes, by task."""
        return self._follower.problems()

    def status(self) -> EngineStatus:
        """Return how the engine stands."""
        engine, counts = self._engine, self._engine.counts
        reason = ""
        if self._is_draining:
            reason = "closing"
        elif not self._follower.routes:
            reason = "no prompt is loaded yet"
        elif not engine.num_ready:
            reason = "the engine's processes are starting"
        return EngineStatus(
            backbone=engine.backbone,
            ready=not reason,
            reason=reason,
            queued_rows=engine.num_waiting,
            queue_limit=engine.config.queue_rows,
            running_rows=engine.num_running,
            batches=counts.batches,
            batch_rows=counts.rows,
            batch_tasks=counts.tasks,
            batch_tokens=counts.tokens,
            padded_tokens=counts.padded,
            engines=engine.num_ready,
            resident=len(engine.sizes),
            resident_bytes=sum(engine.sizes.values()),
            stale_s=time.monotonic() - self._follower.answered_at,
            changes=self._follower.changes,
            swaps=self._follower.swaps,
            last_swap_s=self._follower.last_swap_s,
            disagreements=dict(self._compared),
        )

    # Following the registry

    async def follow(self, every_s: float) -> None:
        """Look at the aliases again and again, until it is cancelled; log what changed."""
        await self._follower.follow(every_s)

    async def reload(self) -> list[str]:
        """Look at the aliases now, and swap what moved; return what changed, a line each."""
        # whoever asked may go: what is half loaded would stay so, with nobody to use it
        looking = asyncio.get_running_loop().create_task(self._follower.reload())
        self._looks.add(looking)
        looking.add_done_callback(self._looks.discard)
        return await asyncio.shield(looking)

    async def adopt(
        self,
        routings: Mapping[str, Routing],
        *,
        known: Mapping[str, Routing] | None = None,
        told: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Make routings true, task by task; see `Follower.adopt`."""
        return await self._follower.adopt(routings, known=known, told=told)

    # The end

    async def drain(self, *, timeout_s: float) -> bool:
        """Take no new requests, answer those that were taken; return whether all were."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the engine and all that runs beside the requests."""
        self._is_draining = True
        for task in (*self._shadows, *self._looks):
            task.cancel()
        self._follower.close()
        await self._engine.close()
        self._asker.close()


def _is_fault(error: ServingError) -> bool:
    """Tell whether an error speaks against the prompt that was asked."""
    return type(error) is ServingError


def agrees(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two prompts gave the same answer, whatever their certainty."""
    for key in COMPARED:
        if key in one:
            first, second = one[key], other.get(key)
            if isinstance(first, float) and isinstance(second, float):
                return abs(first - second) <= VALUE_TOLERANCE
            return bool(first == second)
    return False
