"""Making the registry's wishes true while requests are answered."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from ptv2_core.errors import ArtifactError, PTv2Error
from ptv2_serving.admitting import Admitter
from ptv2_serving.answering import PromptId, Role
from ptv2_serving.engine.engine import Engine
from ptv2_serving.guard import Record
from ptv2_serving.loading import Loader
from ptv2_serving.routes import Resident, Route
from ptv2_serving.routing import ResolvedVersion, Routing
from ptv2_serving.tracking import StoreError
from ptv2_serving.wishes import is_broken

LOG = logging.getLogger(__name__)
# before what could not be loaded is tried again, unless the registry wishes something else
RETRY_AFTER_S = 60.0


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


class Follower:
    """Holds the routes. A swap is one reference put in place of another.

    Attributes:
        routes: What is loaded, by task.
        changes: Times that a route or a problem became another.
        swaps: Times that a champion moved and its prompt was swapped in.
        last_swap_s: From the look that saw the moved alias to the end of the last swap, other
            tasks' swaps in between included; None: none yet.
        answered_at: When the registry last answered, by the monotonic clock.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        wishes: Wishes,
        *,
        tasks: Sequence[str] | None,
        warm: int,
    ) -> None:
        """Hold no route yet; arguments as for `PromptService`."""
        self.routes: dict[str, Route] = {}
        self.changes = 0
        self.swaps = 0
        self.last_swap_s: float | None = None
        self.answered_at = time.monotonic()
        self._engine = engine
        self._loader = loader
        self._admitter = Admitter(engine, loader)
        self._in_loader = self._admitter.in_loader
        self._wishes = wishes
        self._tasks = tuple(tasks) if tasks else None
        self._warm = warm
        # what each route was made from
        self._routings: dict[str, Routing] = {}
        # why a task is not as wished; its canary or shadow; what the registry itself left out
        self._problems: dict[str, str] = {}
        self._beside_problems: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self._counted_problems: dict[str, str] = {}
        self._failed: dict[str, tuple[Routing, float]] = {}
        # canaries that were taken back here: the registry may still name them
        self._rejected: dict[str, int] = {}
        self._is_away = False
        self._lock = asyncio.Lock()
        self._telling: set[asyncio.Task[None]] = set()

    def problems(self) -> dict[str, str]:
        """Return why tasks are not served, or not as the registry wishes, by task."""
        return self._left_out | self._beside_problems | self._problems

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
        async with self._lock:
            try:
                routings = await self._admitter.in_loader(
                    lambda: self._wishes.routings(self._tasks)
                )
            except StoreError as error:
                is_news = not self._is_away
                self._is_away = True
                return [f"the registry does not answer: {error}"] if is_news else []
            self._is_away = False
            self.answered_at = time.monotonic()
            self._left_out = dict(self._wishes.problems)
            return await self.adopt(routings, seen_at=self.answered_at)

    async def adopt(
        self,
        routings: Mapping[str, Routing],
        *,
        known: Mapping[str, Routing] | None = None,
        seen_at: float | None = None,
        told: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Make routings true, task by task; one that fails leaves what the task had.

        Args:
            routings: By task; a task that is served and not among them is served as it was.
            known: What was served last, by task: taken where the task has nothing else.
            seen_at: When the registry said so, by the monotonic clock; None: now.
            told: Is given the name of each task that is done.
        """
        lines = []
        seen_at = time.monotonic() if seen_at is None else seen_at
        for task, routing in routings.items():
            if self._is_due(task, routing):
                lines += await self._try(task, routing, seen_at)
            earlier = (known or {}).get(task)
            if task not in self.routes and earlier is not None and earlier != routing:
                lines += await self._fall_back(task, earlier, seen_at)
            if told is not None:
                told(task)
        self._count_problems()
        if lines:
            lines += await self._remember()
        return lines

    def _count_problems(self) -> None:
        problems = self.problems()
        if problems != self._counted_problems:
            self._counted_problems = problems
            self.changes += 1

    async def _fall_back(self, task: str, routing: Routing, seen_at: float) -> list[str]:
        """Serve what was served last; what is wrong with the wish stays known, and is retried."""
        problem, failed = self._problems.get(task), self._failed.get(task)
        lines = await self._try(task, routing, seen_at)
        if task in self.routes and problem is not None and failed is not None:
            self._failed[task] = failed
            self._problems[task] = f"version {routing.champion}, served last, answers: {problem}"
        return lines

    async def _remember(self) -> list[str]:
        """Keep what is served as the last known to be good; return what is wrong with that."""
        good = {task: self._routings[task] for task in self.routes if task in self._routings}
        broken = {task for task, why in self._wishes.problems.items() if is_broken(why)}
        failed = (broken | self._failed.keys()) - good.keys()
        folders = {
            resident.folder for route in self.routes.values() for resident in route.residents()
        }
        try:
            await self._in_loader(lambda: self._loader.remember(good, folders, failed=failed))
        except PTv2Error as error:
            return [f"what is served could not be remembered: {error}"]
        return []

    def _is_due(self, task: str, routing: Routing) -> bool:
        """Tell whether a routing is new, or could not be followed some time ago."""
        if task not in self._failed:
            return routing != self._routings.get(task)
        failed, at = self._failed[task]
        return routing != failed or time.monotonic() - at > RETRY_AFTER_S

    async def _try(self, task: str, routing: Routing, seen_at: float) -> list[str]:
        """Follow a routing; what is wrong with it is kept, and told once."""
        try:
            lines = await self._follow(task, routing, seen_at)
        except Exception as error:
            # whatever one task's prompt does, the others are followed
            problem = _words(error)
            is_known = self._problems.get(task) == problem
            self._problems[task] = problem
            self._count_problems()
            self._failed[task] = (routing, time.monotonic())
            self._wishes.forget(task)
            return [] if is_known else [f"{task}: {problem}"]
        self._problems.pop(task, None)
        self._failed.pop(task, None)
        self._routings[task] = routing
        if task in self._beside_problems:
            self._failed[task] = (routing, time.monotonic())
        return lines

    async def _follow(self, task: str, routing: Routing, seen_at: float) -> list[str]:
        """Load what a routing names, then swap the task's route in one reference."""
        if routing.canary != self._rejected.get(task):
            self._rejected.pop(task, None)
        self._beside_problems.pop(task, None)
        fresh: dict[int, Resident] = {}
        kept: set[int] = set()
        try:
            while True:
                before = self.routes.get(task)
                champion = await self._resident(before, routing.versions[routing.champion], fresh)
                canary = await self._beside(before, routing, "canary", fresh)
                shadow = await self._beside(before, routing, "shadow", fresh)
                if self.routes.get(task) is before:
                    break
                # a canary was taken back meanwhile, and with it what was found in that route
            named = {resident.id for resident in (champion, canary, shadow) if resident}
            after = Route(
                champion=champion,
                canary=canary,
                canary_share=routing.canary_share if canary else 0.0,
                shadow=shadow,
                warm=self._kept_warm(before, named),
            )
            if before and before.canary and canary and before.canary.id == canary.id:
                after = replace(after, records=before.records)
            self._swap(task, before, after)
            kept = {resident.slot for resident in after.residents()}
        finally:
            for resident in fresh.values():
                if resident.slot not in kept:
                    self._engine.drop(resident.slot)
        if before is not None and champion.id != before.champion.id:
            self.swaps += 1
            self.last_swap_s = time.monotonic() - seen_at
        return _changes(task, before, after)

    async def _beside(
        self,
        before: Route | None,
        routing: Routing,
        role: Literal["canary", "shadow"],
        fresh: dict[int, Resident],
    ) -> Resident | None:
        """Return a canary or shadow; what is wrong with one leaves the champion alone."""
        number = routing.canary if role == "canary" else routing.shadow
        task = routing.task
        if number is None or (role == "canary" and self._rejected.get(task) == number):
            return None
        try:
            return await self._resident(before, routing.versions[number], fresh)
        except Exception as error:
            # as in `_try`
            problem = _words(error)
            self._beside_problems[task] = f"the {role}, version {number}, is not loaded: {problem}"
            if role == "canary" and isinstance(error, ArtifactError):
                self._rejected[task] = number
                self._tell(task, number, problem)
            return None

    async def _resident(
        self, before: Route | None, version: ResolvedVersion, fresh: dict[int, Resident]
    ) -> Resident:
        """Return a version as it is loaded already, or load it, into `fresh`."""
        found = fresh.get(version.version) or self._find(before, version)
        if found is None:
            found = fresh[version.version] = await self._admitter.admit(version)
        return found

    def _find(self, route: Route | None, version: ResolvedVersion) -> Resident | None:
        """Return a version that is loaded for the task already."""
        if route is None:
            return None
        return next((one for one in route.residents() if one.id == version.prompt), None)

    def _kept_warm(self, before: Route | None, named: set[PromptId]) -> tuple[Resident, ...]:
        """Return the earlier prompts that stay loaded, latest first."""
        if before is None:
            return ()
        earlier = [one for one in (before.champion, *before.warm) if one.id not in named]
        return tuple(earlier[: self._warm])

    def _swap(self, task: str, before: Route | None, after: Route) -> None:
        self.routes[task] = after
        self.changes += 1
        if before is None:
            return
        kept = {resident.slot for resident in after.residents()}
        for resident in before.residents():
            if resident.slot not in kept:
                self._engine.drop(resident.slot)

    # Canaries

    def take_back(self, task: str, route: Route, reason: str) -> None:
        """Route all of a task's requests to the champion at once, then tell the registry."""
        assert route.canary is not None, "who judges it has one"
        version = route.canary.id.version
        self._rejected[task] = version
        self._beside_problems[task] = f"the canary, version {version}, was taken back: {reason}"
        records: dict[Role, Record] = {"champion": Record(), "canary": Record()}
        after = replace(route, canary=None, canary_share=0.0, records=records)
        self._swap(task, route, after)
        self._tell(task, version, reason)

    def _tell(self, task: str, version: int, reason: str) -> None:
        telling = asyncio.get_running_loop().create_task(self._tell_registry(task, version, reason))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _tell_registry(self, task: str, version: int, reason: str) -> None:
        try:
            await self._admitter.in_loader(
                lambda: self._wishes.stop_canary(task, reason, expect=version)
            )
        except PTv2Error as error:
            # it stays taken back here; a registry that may only be read is no fault
            self._beside_problems[task] = f"the canary {version} was taken back here alone: {error}"
            self._count_problems()

    def close(self) -> None:
        """Stop telling and loading."""
        for telling in list(self._telling):
            telling.cancel()
        self._admitter.close()


def _words(error: Exception) -> str:
    """Return an error in a user's words; one that has none goes into the log."""
    if isinstance(error, PTv2Error):
        return str(error)
    LOG.error("a prompt could not be loaded", exc_info=error)
    return f"it could not be loaded ({type(error).__name__}); the server's log says more"


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
