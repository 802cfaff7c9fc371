"""The service behind HTTP: routes, the engine, and the registry's wishes followed while it runs."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from ptv2_core.errors import DataError, PTv2Error
from ptv2_core.evaluation.codec import Asked
from ptv2_serving.answering import (
    Answer,
    EngineStatus,
    NotReadyError,
    Role,
    ServingError,
    TaskStatus,
    TooLongError,
    UnknownTaskError,
)
from ptv2_serving.engine.engine import Computed, Engine
from ptv2_serving.guard import Limits, Record, verdict
from ptv2_serving.loading import Loader, example_of
from ptv2_serving.routes import Resident, Route
from ptv2_serving.routing import ResolvedVersion, Routing
from ptv2_serving.tracking import StoreError

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

# what two answers to one input are compared by
COMPARED = ("label", "tags", "choice", "text", "value")
# before what could not be loaded is tried again, unless the registry wishes something else
RETRY_AFTER_S = 60.0
# numbers that are closer than this are one answer
VALUE_TOLERANCE = 1e-2


class Wishes(Protocol):
    """What says which versions should answer: the registry.

    Attributes:
        problems: Why a task, a canary or a shadow was left out of the last routings, by task.
    """

    problems: dict[str, str]

    def routings(self, tasks: Sequence[str] | None = None) -> dict[str, Routing]:
        """Return what it wishes for the tasks; for all it has, where None."""
        ...

    def forget(self, task: str) -> None:
        """Ask anew for a task's versions the next time: what was wrong may have been mended."""
        ...

    def stop_canary(self, task: str, reason: str = "", *, expect: int | None = None) -> object:
        """End a canary, if it still is version `expect`."""
        ...


class PromptService:
    """One backbone, many prompts. Everything here runs on one event loop.

    A request is bound to one resident prompt when it comes, so a swap while it waits changes
    nothing for it. Texts are read and answers made on one thread of their own: tokenizers keep
    settings inside, and two threads would change them under each other.
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
        self._loader = loader
        self._wishes = wishes
        self._tasks = tuple(tasks) if tasks else None
        self._warm = warm
        self._limits = limits or Limits()
        self._routes: dict[str, Route] = {}
        self._routings: dict[str, Routing] = {}
        self._problems: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self._failed: dict[str, tuple[Routing, float]] = {}
        # canaries that were taken back here: the registry may still name them
        self._rejected: dict[str, int] = {}
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="ptv2-text")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix="ptv2-load")
        self._reload_lock = asyncio.Lock()
        self._is_draining = False
        self._is_away = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._background: set[asyncio.Task[Any]] = set()
        self._answered_at = time.monotonic()
        self._swaps = 0
        self._last_swap_s: float | None = None
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
        route = self._routes.get(task)
        if route is None:
            raise UnknownTaskError(self._unknown(task))
        resident, role = route.choose(request_id, version)
        self._in_flight += 1
        self._idle.clear()
        try:
            answer = await self._ask(resident, role, inputs, timeout_s, refuse_long=refuse_long)
        except ServingError as error:
            self._judge(task, route, role, 0.0, failed=_is_fault(error))
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
        self._judge(task, route, role, answer.queued_s + answer.computed_s, failed=False)
        if route.shadow is not None and role == "champion" and version is None:
            self._spawn(self._shadow(task, route.shadow, inputs, answer, timeout_s))
        return answer

    async def _ask(
        self,
        resident: Resident,
        role: Role,
        inputs: Sequence[Mapping[str, Any]],
        timeout_s: float,
        *,
        refuse_long: bool = False,
        yields: bool = False,
    ) -> Answer:
        asked = await self._off_loop(lambda: resident.codec.encode(inputs))
        if refuse_long and any(asked.is_cut):
            raise TooLongError(
                f"input {asked.is_cut.index(True) + 1} has more than the "
                f"{resident.codec.max_length} tokens that version {resident.id.version} of "
                f"{resident.id.task!r} reads; shorten it"
            )
        computed = await self._engine.compute(
            resident.slot, asked.split, timeout_s=timeout_s, yields=yields
        )
        predictions = await self._off_loop(lambda: _decode(resident, asked, computed))
        return Answer(
            prompt=resident.id,
            role=role,
            predictions=predictions,
            truncated=asked.is_cut,
            queued_s=computed.queued_s,
            computed_s=computed.computed_s,
        )

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, work)

    def _unknown(self, task: str) -> str:
        loaded = ", ".join(sorted(self._routes)[:20]) or "none"
        problems = self.problems()
        problem = f" {problems[task]}" if task in problems else ""
        return f"no prompt for the task {task[:64]!r} is loaded; loaded are: {loaded}.{problem}"

    # What is loaded

    def tasks(self) -> list[TaskStatus]:
        """Return what is loaded, by task name."""
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
                problem=self.problems().get(task) or route.problem,
            )
            for task, route in sorted(self._routes.items())
        ]

    def problems(self) -> dict[str, str]:
        """Return why tasks are not served, or not as the registry wishes, by task."""
        return self._left_out | self._problems

    def status(self) -> EngineStatus:
        """Return how the engine stands."""
        engine, counts = self._engine, self._engine.counts
        reason = ""
        if self._is_draining:
            reason = "closing"
        elif not self._routes:
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
            stale_s=time.monotonic() - self._answered_at,
            swaps=self._swaps,
            last_swap_s=self._last_swap_s,
            disagreements=dict(self._compared),
        )

    # Following the registry

    async def follow(self, every_s: float) -> None:
        """Look at the aliases again and again, until it is cancelled; log what changed."""
        while True:
            await asyncio.sleep(every_s)
            try:
                lines = await self.reload()
            except Exception:
                # whatever is wrong with one look, the next one may succeed: never go blind
                LOG.exception("the registry's aliases could not be followed")
                continue
            for line in lines:
                LOG.info(line)

    async def reload(self) -> list[str]:
        """Look at the aliases now, and load and swap what moved; return what changed, a line each.

        A registry that does not answer changes nothing, and is told once; `status` says how long
        ago it did.
        """
        async with self._reload_lock:
            try:
                routings = await self._in_loader(lambda: self._wishes.routings(self._tasks))
            except StoreError as error:
                is_news = not self._is_away
                self._is_away = True
                return [f"the registry does not answer: {error}"] if is_news else []
            self._is_away = False
            self._answered_at = time.monotonic()
            self._left_out = dict(self._wishes.problems)
            return await self.adopt(routings)

    async def adopt(
        self, routings: Mapping[str, Routing], *, told: Callable[[str], None] | None = None
    ) -> list[str]:
        """Make routings true, task by task; one that fails leaves what the task had.

        Args:
            routings: By task; a task that is served and not among them is served as it was.
            told: Is given the name of each task that is done.
        """
        lines = []
        for task, routing in routings.items():
            if self._is_due(task, routing):
                lines += await self._try(task, routing)
            if told is not None:
                told(task)
        if lines:
            good = {task: self._routings[task] for task in self._routes if task in self._routings}
            folders = {
                resident.folder for route in self._routes.values() for resident in route.residents()
            }
            try:
                await self._in_loader(lambda: self._loader.remember(good, folders))
            except PTv2Error as error:
                lines.append(f"what is served could not be remembered: {error}")
        return lines

    def _is_due(self, task: str, routing: Routing) -> bool:
        """Tell whether a routing is new, or could not be followed some time ago."""
        if task not in self._failed:
            return routing != self._routings.get(task)
        failed, at = self._failed[task]
        return routing != failed or time.monotonic() - at > RETRY_AFTER_S

    async def _try(self, task: str, routing: Routing) -> list[str]:
        """Follow a routing; what is wrong with it is kept, and told once."""
        try:
            lines = await self._follow(task, routing, time.monotonic())
        except PTv2Error as error:
            is_known = self._problems.get(task) == str(error)
            self._problems[task] = str(error)
            self._failed[task] = (routing, time.monotonic())
            self._wishes.forget(task)
            return [] if is_known else [f"{task}: {error}"]
        self._problems.pop(task, None)
        self._failed.pop(task, None)
        self._routings[task] = routing
        return lines

    async def _follow(self, task: str, routing: Routing, seen_at: float) -> list[str]:
        """Load what a routing names, then swap the task's route in one reference."""
        before = self._routes.get(task)
        canary_version = routing.canary
        if canary_version is not None and self._rejected.get(task) == canary_version:
            canary_version = None
        loaded: dict[int, Resident] = {}
        new: list[Resident] = []
        try:
            for number in (routing.champion, canary_version, routing.shadow):
                if number is not None and number not in loaded:
                    version = routing.versions[number]
                    found = self._find(before, version)
                    if found is None:
                        found = await self._load(version)
                        new.append(found)
                    loaded[number] = found
        except PTv2Error:
            for resident in new:
                self._engine.drop(resident.slot)
            raise
        champion = loaded[routing.champion]
        canary = None if canary_version is None else loaded[canary_version]
        after = Route(
            champion=champion,
            canary=canary,
            canary_share=routing.canary_share if canary else 0.0,
            shadow=None if routing.shadow is None else loaded[routing.shadow],
            warm=self._kept_warm(before, loaded),
        )
        if before and before.canary and canary and before.canary.id == canary.id:
            after = replace(after, records=before.records)
        self._swap(task, before, after)
        if before is not None and champion.id != before.champion.id:
            self._swaps += 1
            self._last_swap_s = time.monotonic() - seen_at
        return _changes(task, before, after)

    def _find(self, route: Route | None, version: ResolvedVersion) -> Resident | None:
        """Return a version that is loaded for the task already."""
        if route is None:
            return None
        return next((one for one in route.residents() if one.id == version.prompt), None)

    async def _load(self, version: ResolvedVersion) -> Resident:
        """Fetch, verify and load a version, and see that it answers as it should."""
        prepared = await self._in_loader(lambda: self._loader.prepare(version))
        slot = await self._engine.put(prepared.path, alone=prepared.alone)
        resident = Resident(
            id=version.prompt,
            manifest=prepared.manifest,
            codec=prepared.codec,
            slot=slot,
            folder=prepared.path.name,
        )
        try:
            await self._warm_up(resident)
        except PTv2Error:
            self._engine.drop(slot)
            raise
        return resident

    async def _warm_up(self, resident: Resident) -> None:
        """Ask the first golden input through the engine, as a request would."""
        golden = resident.manifest.golden[:1]
        if golden:
            answer = await self._ask(resident, "shadow", [golden[0]["input"]], 30.0)
            assert len(answer.predictions) == 1, "an input has an answer"

    def _kept_warm(
        self, before: Route | None, loaded: Mapping[int, Resident]
    ) -> tuple[Resident, ...]:
        """Return the earlier prompts that stay loaded, latest first."""
        if before is None:
            return ()
        new = {resident.id for resident in loaded.values()}
        earlier = [one for one in (before.champion, *before.warm) if one.id not in new]
        return tuple(earlier[: self._warm])

    def _swap(self, task: str, before: Route | None, after: Route) -> None:
        self._routes[task] = after
        if before is None:
            return
        kept = {resident.slot for resident in after.residents()}
        for resident in before.residents():
            if resident.slot not in kept:
                self._engine.drop(resident.slot)

    async def _in_loader(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._load_thread, work)

    # Canary and shadow

    def _judge(self, task: str, route: Route, role: Role, seconds: float, *, failed: bool) -> None:
        """Remember how a request went, and take a canary back that does too badly."""
        if route.canary is None or role == "shadow":
            return
        route.records[role].add(seconds, failed=failed)
        reason = verdict(route.records["champion"], route.records["canary"], self._limits)
        if role == "canary" and reason is not None and self._routes.get(task) is route:
            self._take_back(task, route, reason)

    def _take_back(self, task: str, route: Route, reason: str) -> None:
        """Route all requests to the champion at once, then tell the registry."""
        assert route.canary is not None, "who judges it has one"
        version = route.canary.id.version
        self._rejected[task] = version
        problem = f"the canary, version {version}, was taken back: {reason}"
        self._swap(
            task,
            route,
            replace(
                route,
                canary=None,
                canary_share=0.0,
                problem=problem,
                records={"champion": Record(), "canary": Record()},
            ),
        )
        self._spawn(self._tell_registry(task, version, reason))

    async def _tell_registry(self, task: str, version: int, reason: str) -> None:
        try:
            await self._in_loader(lambda: self._wishes.stop_canary(task, reason, expect=version))
        except PTv2Error as error:
            # it stays taken back here; a registry that may only be read is no fault
            self._problems[task] = f"the canary {version} was taken back here alone: {error}"

    async def _shadow(
        self,
        task: str,
        shadow: Resident,
        inputs: Sequence[Mapping[str, Any]],
        answer: Answer,
        timeout_s: float,
    ) -> None:
        """Ask the shadow what the champion was asked, when there is room, and count differences."""
        try:
            other = await self._ask(shadow, "shadow", inputs, timeout_s, yields=True)
        except (ServingError, DataError):
            return
        different = sum(
            not agrees(one, two)
            for one, two in zip(answer.predictions, other.predictions, strict=True)
        )
        compared, so_far = self._compared.get(task, (0, 0))
        self._compared[task] = (compared + len(inputs), so_far + different)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

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
        for task in list(self._background):
            task.cancel()
        await self._engine.close()
        self._text_thread.shutdown(wait=False, cancel_futures=True)
        self._load_thread.shutdown(wait=False, cancel_futures=True)


def _decode(resident: Resident, asked: Asked, computed: Computed) -> list[dict[str, Any]]:
    return resident.codec.decode(asked, computed.logits)


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


def _changes(task: str, before: Route | None, after: Route) -> list[str]:
    """Say what a swap changed, a line each."""
    lines = []
    for role in ("champion", "canary", "shadow"):
        old = getattr(before, role).id if before and getattr(before, role) else None
        new = getattr(after, role).id if getattr(after, role) else None
        if old != new:
            was, now = (one.version if one else "none" for one in (old, new))
            lines.append(f"{task}: {role} {was} -> {now}")
    if before and before.canary_share != after.canary_share:
        lines.append(f"{task}: canary share {before.canary_share:g} -> {after.canary_share:g}")
    return lines
