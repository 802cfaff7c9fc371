"""An engine on several cards: each has a process of its own, and its troubles alone."""

import asyncio
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.base import Backbone
from ptv2_serving.answering import ServingError
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.engine.requests import Computed
from ptv2_serving.engine.worker import Worker
from tests.serving.engine_parts import Served, questions

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class OnCards(BackboneChoice):
    """A backbone on two cards, which are the CPU and leave their numbers beside its folder."""

    @property
    def num_cards(self) -> int:
        return 2

    def load(self, card: int | None = None) -> Backbone:
        (Path(self.name).parent / f"card-{card}-{os.getpid()}").touch()
        return super().load()


def _loaded(folder: Path) -> list[tuple[int, int]]:
    """Return the cards on which it was loaded, and by which processes."""
    return sorted(
        (int(card), int(pid))
        for _, card, pid in (one.name.split("-") for one in folder.glob("card-*"))
    )


def test_engine_loads_the_backbone_on_every_card_and_again_where_its_process_died(
    tmp_path: Path,
) -> None:
    made = Served(tmp_path, choice=OnCards, processes=3, batch_rows=2)

    async def followed() -> list[Any]:
        await made.start()
        assert made.engine.num_ready == 3
        found = await asyncio.gather(*(made.ask(*question) for question in questions(60)))
        victim = next(one for one in made.engine.pool.workers if one.card == 1)
        os.kill(victim.pid or 0, signal.SIGKILL)
        again = await asyncio.gather(*(made.ask(*question) for question in questions(60)))
        await made.whole()
        last = await asyncio.gather(*(made.ask(*question) for question in questions(60)))
        return [*found, *again, *last]

    for question, computed in zip(questions(60) * 3, made.runner.run(followed()), strict=True):
        made.check(*question, computed)
    pids = {worker.pid for worker in made.engine.pool.workers}
    assert [worker.card for worker in made.engine.pool.workers] == [0, 0, 1]
    assert len(pids) == 3
    loaded = _loaded(tmp_path)
    assert pids < {pid for _, pid in loaded}
    made.runner.run(made.engine.close())
    made.runner.close()
    _check_all_ended(loaded, [0, 0, 1, 1])


def _check_all_ended(loaded: list[tuple[int, int]], cards: list[int]) -> None:
    assert [card for card, _ in loaded] == cards
    for _, pid in loaded:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@dataclass(frozen=True, kw_only=True)
class Troubled(OnCards):
    """Cards with troubles, each a file beside the backbone's folder that is named for its card."""

    def load(self, card: int | None = None) -> Backbone:
        place = Path(self.name).parent
        while (place / f"slow-{card}").exists():
            time.sleep(0.01)
        if (place / f"broken-{card}").exists():
            raise BackboneError("the card is broken")
        found = super().load(card)
        if (place / f"unlike-{card}").exists():
            return replace(self, precision="bf16").load_plain()
        return found

    def load_plain(self) -> Backbone:
        return BackboneChoice.load(self)


@pytest.mark.parametrize(
    ("trouble", "words"), [("broken-1", "the card is broken"), ("unlike-1", "--precision")]
)
def test_engine_does_not_start_where_one_card_is_not_as_the_others(
    trouble: str, words: str, tmp_path: Path
) -> None:
    made = Served(tmp_path, choice=Troubled, processes=2)
    (tmp_path / trouble).touch()
    with pytest.raises(ServingError, match=words):
        made.runner.run(made.start())
    made.runner.run(made.engine.close())
    made.runner.close()
    _check_all_ended(_loaded(tmp_path), [0] if trouble == "broken-1" else [0, 1])


def test_engine_that_is_cancelled_while_it_loads_leaves_no_process(tmp_path: Path) -> None:
    made = Served(tmp_path, choice=Troubled, processes=2)
    (tmp_path / "slow-1").touch()
    before = set(multiprocessing.active_children())

    async def cancelled() -> None:
        starting = asyncio.create_task(made.engine.start())
        while not made.engine.num_ready:
            await asyncio.sleep(0.02)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await made.engine.close()

    made.runner.run(cancelled())
    made.runner.close()
    assert made.engine.pool.workers == []
    assert set(multiprocessing.active_children()) == before


def test_engine_that_closes_while_a_card_is_loaded_again_leaves_no_process(
    tmp_path: Path,
) -> None:
    made = Served(tmp_path, choice=Troubled, processes=2)
    before = set(multiprocessing.active_children())

    async def closed() -> None:
        await made.start()
        pool = made.engine.pool
        (tmp_path / "slow-1").touch()
        victim = next(worker for worker in pool.workers if worker.card == 1)
        os.kill(victim.pid or 0, signal.SIGKILL)
        while victim in pool.workers or len(pool.workers) < 2:
            await asyncio.sleep(0.02)
        await made.engine.close()

    made.runner.run(closed())
    made.runner.close()
    assert made.engine.pool.workers == []
    assert set(multiprocessing.active_children()) == before


def test_engine_goes_on_with_the_cards_that_are_not_broken(tmp_path: Path) -> None:
    made = Served(tmp_path, choice=Troubled, processes=2)

    async def killed() -> list[int | None]:
        await made.start()
        pool = made.engine.pool
        (tmp_path / "broken-0").touch()
        for worker in list(pool.workers):
            os.kill(worker.pid or 0, signal.SIGKILL)
        found = await asyncio.gather(*(made.ask(*question) for question in questions(12)))
        for question, computed in zip(questions(12), found, strict=True):
            made.check(*question, computed)
        left = [worker.card for worker in pool.ready]
        (tmp_path / "broken-0").unlink()
        await made.whole()
        return left

    assert made.runner.run(killed()) == [1]
    assert sorted(worker.card or 0 for worker in made.engine.pool.workers) == [0, 1]
    made.runner.run(made.engine.close())
    made.runner.close()


def test_engine_sends_nothing_to_a_process_that_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Served(tmp_path, choice=Troubled, processes=2, batch_rows=2)
    pool = made.engine.pool
    told: list[Worker] = []
    tell = pool._tell

    def telling(worker: Worker, message: tuple[Any, ...]) -> None:
        told.append(worker)
        tell(worker, message)

    monkeypatch.setattr(pool, "_tell", telling)

    async def swapped() -> Worker:
        await made.start()
        (tmp_path / "slow-1").touch()
        victim = next(worker for worker in pool.workers if worker.card == 1)
        os.kill(victim.pid or 0, signal.SIGKILL)
        while victim in pool.workers or len(pool.workers) < 2:
            await asyncio.sleep(0.02)
        loading = next(worker for worker in pool.workers if not worker.is_ready)
        made.engine.drop(made.slots["one"])
        made.slots["one"] = await made.engine.put(made.prompts["one"], alone=False)
        assert loading not in told
        (tmp_path / "slow-1").unlink()
        await made.whole()
        return loading

    loading = made.runner.run(swapped())

    async def asked() -> list[Computed]:
        return await asyncio.gather(*(made.ask(*question) for question in questions(60)))

    for question, computed in zip(questions(60), made.runner.run(asked()), strict=True):
        made.check(*question, computed)
    assert told.count(loading) > 1, "it is filled, and computes"
    made.runner.run(made.engine.close())
    made.runner.close()
