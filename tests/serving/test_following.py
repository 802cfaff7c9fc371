"""Routes stay sound whatever happens while they are made; no engine and no registry is needed."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from ptv2_core.errors import ArtifactError
from ptv2_serving.answering import PromptId
from ptv2_serving.following import Follower
from ptv2_serving.routes import Resident
from ptv2_serving.routing import ResolvedVersion, Routing

TASK = "intents"


def version(number: int, task: str = TASK) -> ResolvedVersion:
    digest = f"{number:064x}"
    return ResolvedVersion(
        task=task, version=number, prompt_sha256=digest, manifest_sha256=digest, source="/x"
    )


def routing(
    champion: int, *, canary: int | None = None, shadow: int | None = None, task: str = TASK
) -> Routing:
    numbers = [number for number in (champion, canary, shadow) if number is not None]
    return Routing(
        task=task,
        champion=champion,
        canary=canary,
        canary_share=50.0 if canary else 0.0,
        shadow=shadow,
        versions={number: version(number, task) for number in numbers},
    )


class Slots:
    """Stands for the engine: it knows which slots are used, and counts drops."""

    def __init__(self) -> None:
        self.used: set[int] = set()
        self.numbers = itertools.count()

    def put(self) -> int:
        slot = next(self.numbers)
        self.used.add(slot)
        return slot

    def drop(self, slot: int) -> None:
        self.used.remove(slot)  # twice is an error


class Files:
    """Stands for the loader."""

    def __init__(self) -> None:
        self.remembered: list[tuple[set[str], set[str]]] = []

    def remember(
        self, routings: Mapping[str, Any], resident: set[str], *, failed: Sequence[str] = ()
    ) -> None:
        self.remembered.append((set(routings), set(failed)))

    def close(self) -> None:
        pass


class Registry:
    """Stands for the registry."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.wished: dict[str, Routing] = {}
        self.stopped: list[int | None] = []

    def routings(self, tasks: Sequence[str] | None = None) -> dict[str, Routing]:
        return dict(self.wished)

    def forget(self, task: str) -> None:
        pass

    def stop_canary(self, task: str, reason: str = "", *, expect: int | None = None) -> None:
        self.stopped.append(expect)


class Following:
    """A follower whose prompts are loaded as the test says."""

    def __init__(self) -> None:
        self.slots, self.files, self.registry = Slots(), Files(), Registry()
        engine: Any = self.slots
        loader: Any = self.files
        self.follower = Follower(engine, loader, self.registry, tasks=None, warm=0)
        self.follower._admitter.admit = self.admit  # type: ignore[method-assign]
        self.admitted: list[int] = []
        self.before_admit: dict[int, Callable[[], Any]] = {}

    async def admit(self, wanted: ResolvedVersion) -> Resident:
        slot = self.slots.put()
        self.admitted.append(wanted.version)
        try:
            await asyncio.sleep(0)
            if wanted.version in self.before_admit:
                self.before_admit[wanted.version]()
        except BaseException:
            self.slots.drop(slot)
            raise
        nothing: Any = None
        return Resident(
            id=PromptId(task=wanted.task, version=wanted.version, digest=wanted.prompt_sha256),
            manifest=nothing,
            codec=nothing,
            slot=slot,
            folder=wanted.manifest_sha256,
        )

    async def look(self, *wished: Routing) -> list[str]:
        self.registry.wished = {one.task: one for one in wished}
        return await self.follower.reload()

    def take_back(self) -> None:
        self.follower.take_back(TASK, self.follower.routes[TASK], "it is slow")

    def check(self) -> None:
        """Every route points to slots that are used, and every slot that is used has a route."""
        held = [
            resident.slot
            for route in self.follower.routes.values()
            for resident in route.residents()
        ]
        assert sorted(held) == sorted(self.slots.used)


def test_following_promotes_a_canary_that_is_taken_back_meanwhile() -> None:
    async def followed() -> None:
        made = Following()
        await made.look(routing(1, canary=2))
        # the canary becomes the champion; while the shadow is loaded, it is taken back
        made.before_admit[3] = made.take_back
        await made.look(routing(2, shadow=3))
        route = made.follower.routes[TASK]
        assert (route.champion.id.version, route.canary) == (2, None)
        assert route.shadow is not None
        assert made.admitted == [1, 2, 3, 2]
        made.check()
        made.follower.close()

    asyncio.run(followed())


@pytest.mark.parametrize("stays", [True, False])
def test_following_swaps_while_the_canary_is_taken_back(stays: bool) -> None:
    async def followed() -> None:
        made = Following()
        await made.look(routing(1, canary=2))
        made.before_admit[3] = made.take_back
        await made.look(routing(3, canary=2 if stays else 4))
        route = made.follower.routes[TASK]
        assert route.champion.id.version == 3
        # it stays taken back, though the registry still named it
        assert (route.canary is None) == stays
        made.check()
        await asyncio.sleep(0.05)
        assert made.registry.stopped == [2]
        made.follower.close()

    asyncio.run(followed())


def test_following_keeps_going_with_a_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("what a user need not see")

    async def followed() -> None:
        made = Following()
        await made.look(routing(1), routing(1, task="slots"))
        made.before_admit[2] = broken
        wished = (routing(2, shadow=3), routing(3, task="slots"))
        said = "intents: it could not be loaded (ZeroDivisionError); the server's log says more"
        assert await made.look(*wished) == [said, "slots: champion 1 -> 3"]
        assert made.follower.problems() == {TASK: said.removeprefix("intents: ")}
        made.check()
        # it is not tried again at each look
        assert await made.look(*wished) == []
        assert made.admitted.count(2) == 1
        made.follower.close()

    asyncio.run(followed())
    assert "what a user need not see" in caplog.text


def test_following_drops_what_it_loaded_for_a_route_that_did_not_come() -> None:
    def ended() -> None:
        raise asyncio.CancelledError

    def refused() -> None:
        raise ArtifactError("a wrong digest")

    async def followed() -> None:
        made = Following()
        await made.look(routing(1))
        made.before_admit[3] = ended
        with pytest.raises(asyncio.CancelledError):
            await made.look(routing(2, shadow=3))
        made.check()
        made.before_admit[3] = refused
        assert await made.look(routing(2, shadow=3)) == ["intents: champion 1 -> 2"]
        assert "version 3, is not loaded: a wrong digest" in made.follower.problems()[TASK]
        made.check()
        made.follower.close()

    asyncio.run(followed())


def test_following_counts_a_swap_from_the_look_that_saw_the_alias() -> None:
    async def followed() -> None:
        made = Following()
        await made.look(routing(1), routing(1, task="slots"))
        admit = made.follower._admitter.admit

        async def slow(wanted: ResolvedVersion) -> Resident:
            await asyncio.sleep(0.1)
            return await admit(wanted)

        made.follower._admitter.admit = slow  # type: ignore[method-assign]
        await made.look(routing(2), routing(2, task="slots"))
        assert made.follower.swaps == 2
        assert made.follower.last_swap_s is not None
        assert made.follower.last_swap_s >= 0.2  # it waited for the other task's
        made.follower.close()

    asyncio.run(followed())


def test_following_serves_what_was_last_in_place_of_what_cannot_be_loaded() -> None:
    def broken() -> None:
        raise ArtifactError("a wrong digest")

    async def followed() -> None:
        made = Following()
        made.before_admit = {2: broken, 9: broken}
        wished = {TASK: routing(2), "slots": routing(9, task="slots")}
        lines = await made.follower.adopt(wished, known={TASK: routing(1)})
        assert lines == [
            "intents: a wrong digest", "intents: champion none -> 1", "slots: a wrong digest",
        ]  # fmt: skip
        assert made.follower.problems() == {
            TASK: "version 1, served last, answers: a wrong digest",
            "slots": "a wrong digest",
        }
        # what is not served for a fault is not forgotten
        assert made.files.remembered == [({TASK}, {"slots"})]
        # nor is the wish tried again at once
        assert await made.look(*wished.values()) == []
        made.check()
        made.follower.close()

    asyncio.run(followed())


def test_following_counts_a_problem_at_once_and_its_end() -> None:
    async def followed() -> None:
        made = Following()
        await made.look(routing(1), routing(1, task="other"))
        before = made.follower.changes
        seen: list[tuple[int, set[str]]] = []

        def refuse() -> None:
            raise ArtifactError("broken")

        def look() -> None:
            # the other task is still to be loaded
            seen.append((made.follower.changes, set(made.follower.problems())))

        made.before_admit = {2: refuse, 3: look}
        await made.look(routing(2), routing(3, task="other"))
        assert seen == [(before + 1, {TASK})]
        counted = made.follower.changes
        await made.look(routing(2), routing(3, task="other"))
        assert made.follower.changes == counted
        await made.look(routing(1), routing(3, task="other"))
        assert made.follower.changes == counted + 2, "a route is made anew, and the problem gone"
        made.registry.problems = {"third": "it has no champion"}
        await made.look(routing(1), routing(3, task="other"))
        assert made.follower.changes == counted + 3

    asyncio.run(followed())
