"""The engine's answers are the predictor's, whatever else is asked and whoever dies."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptv2_core.evaluation.codec import Asked
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.model.backbones.locating import locate
from ptv2_serving.answering import BusyError, DeadlineError, NotReadyError, ServingError
from ptv2_serving.engine.engine import Computed, Engine, EngineConfig
from ptv2_serving.engine.forward import BackboneChoice
from tests.tiny import tiny_artifact, tiny_backbone

pytestmark = pytest.mark.slow

TEXTS = ["book a flight", "cancel the meeting on monday at noon please", "play", "call my taxi"]


class Served:
    """An engine with prompts of several tasks, and the predictors that say what is right."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.folder = tiny_backbone(root / "backbone")
        self.prompts = {
            name: tiny_artifact(root / name, self.folder, kind=kind, seed=seed)
            for seed, (name, kind) in enumerate(
                [("one", "classification"), ("two", "tagging"), ("three", "classification")]
            )
        }
        self.predictors = {
            name: Predictor.load(path, device="cpu", precision="fp32")
            for name, path in self.prompts.items()
        }
        self.engine = Engine(
            BackboneChoice(
                name=str(self.folder),
                revision=None,
                digest=locate(str(self.folder)).digest(),
                device="cpu",
                precision="fp32",
                language_model=False,
            ),
            EngineConfig(**settings),
        )
        self.slots: dict[str, int] = {}
        self.runner = asyncio.Runner()

    async def start(self) -> None:
        await self.engine.start()
        for name, path in self.prompts.items():
            self.slots[name] = await self.engine.put(path, alone=False)

    def asked(self, name: str, text: str) -> Asked:
        return self.predictors[name].codec.encode([{"text": text}])

    async def ask(self, name: str, text: str, **settings: Any) -> Computed:
        split = self.asked(name, text).split
        return await self.engine.compute(self.slots[name], split, **{"timeout_s": 30.0, **settings})

    def check(self, name: str, text: str, found: Computed) -> None:
        predictor = self.predictors[name]
        own = predictor.codec.logits_by_input(self.asked(name, text), found.logits)
        for expected, got in zip(predictor.logits([{"text": text}]), own, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("engine"), processes=2, queue_rows=256, batch_rows=16)
    made.runner.run(made.start())
    yield made
    made.runner.run(made.engine.close())
    made.runner.close()


def questions(count: int) -> list[tuple[str, str]]:
    names = ["one", "two", "three"]
    return [(names[i % 3], TEXTS[i % len(TEXTS)]) for i in range(count)]


def test_engine_answers_mixed_requests_as_each_prompt_alone_does(served: Served) -> None:
    async def all_at_once() -> list[Computed]:
        return await asyncio.gather(*(served.ask(*question) for question in questions(60)))

    before = served.engine.counts.batches
    found = served.runner.run(all_at_once())
    for (name, text), computed in zip(questions(60), found, strict=True):
        served.check(name, text, computed)
        assert computed.queued_s >= 0
        assert computed.computed_s > 0
    assert served.engine.counts.batches - before < 30  # many rows shared a batch


def test_engine_uses_all_of_its_processes_and_shares_one_backbone(served: Served) -> None:
    assert served.engine.num_ready == 2
    assert served.engine.backbone["precision"] == "float32"
    host = served.engine._host
    assert host is not None
    assert len(_children(host.process.pid)) == 2


def test_engine_survives_the_death_of_all_processes_under_load(served: Served) -> None:
    async def killed() -> list[Computed]:
        tasks = [asyncio.create_task(served.ask(*question)) for question in questions(200)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        host = served.engine._host
        assert host is not None
        for pid in _children(host.process.pid):
            os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    before = served.engine.counts.restarts
    found = served.runner.run(killed())
    for (name, text), computed in zip(questions(200), found, strict=True):
        served.check(name, text, computed)
    assert served.engine.counts.restarts - before == 2


def test_engine_loads_the_backbone_anew_when_its_host_died(served: Served) -> None:
    async def killed() -> Computed:
        host = served.engine._host
        assert host is not None
        for pid in [*_children(host.process.pid), host.process.pid]:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
        return await served.ask("two", TEXTS[1])

    served.check("two", TEXTS[1], served.runner.run(killed()))


def test_engine_gives_up_on_a_row_that_ends_every_process_and_answers_the_others(
    served: Served,
) -> None:
    async def poisoned() -> list[Any]:
        split = served.asked("one", TEXTS[0]).split
        # no such token: the backbone's table of embeddings ends before it
        poison = replace(split, input_ids=split.input_ids + 1_000_000)
        tasks = [served.engine.compute(served.slots["one"], poison, timeout_s=60.0)]
        tasks += [served.ask(*question, timeout_s=60.0) for question in questions(20)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = served.engine.counts.restarts
    failed, *found = served.runner.run(poisoned())
    assert isinstance(failed, ServingError)
    assert "the process that computed it ended" in str(failed)
    for (name, text), computed in zip(questions(20), found, strict=True):
        served.check(name, text, computed)
    # in a batch with others, then alone once for each process
    assert served.engine.counts.restarts - before == 3


def test_engine_refuses_what_its_queue_has_no_room_for(served: Served) -> None:
    async def flooded() -> list[Any]:
        return await asyncio.gather(
            *(served.ask(*question) for question in questions(400)), return_exceptions=True
        )

    found = served.runner.run(flooded())
    refused = [error for error in found if isinstance(error, BusyError)]
    assert len(refused) == 400 - 256
    assert all(error.retry_after_s >= 0.1 for error in refused)
    assert sum(isinstance(one, Computed) for one in found) == 256


def test_engine_gives_way_with_requests_nobody_waits_for(served: Served) -> None:
    async def flooded() -> list[Any]:
        return await asyncio.gather(
            *(served.ask(*question, yields=True) for question in questions(200)),
            return_exceptions=True,
        )

    found = served.runner.run(flooded())
    assert sum(isinstance(one, BusyError) for one in found) == 200 - 128


def test_engine_forgets_rows_that_nobody_waits_for_any_more(served: Served) -> None:
    async def cancelled() -> int:
        tasks = [asyncio.create_task(served.ask(*question)) for question in questions(200)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in tasks[10:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return served.engine.num_waiting

    before = served.engine.counts.rows
    assert served.runner.run(cancelled()) == 0
    # those that were given out at once were computed
    assert 10 <= served.engine.counts.rows - before < 200


def test_engine_gives_up_at_the_deadline(served: Served) -> None:
    with pytest.raises(DeadlineError, match="no answer within 0 s"):
        served.runner.run(served.ask("one", TEXTS[0], timeout_s=0.0))
    assert served.engine.num_waiting == 0


def test_engine_drops_a_prompt_after_its_last_request_and_uses_the_slot_again(
    served: Served, tmp_path: Path
) -> None:
    async def swapped() -> tuple[Computed, int, int]:
        slot = await served.engine.put(served.prompts["three"], alone=False)
        split = served.asked("three", TEXTS[0]).split
        task = asyncio.create_task(served.engine.compute(slot, split, timeout_s=30.0))
        await asyncio.sleep(0)
        served.engine.drop(slot)
        computed = await task
        again = await served.engine.put(served.prompts["one"], alone=False)
        split = served.asked("one", TEXTS[0]).split
        served.check("one", TEXTS[0], await served.engine.compute(again, split, timeout_s=30.0))
        served.engine.drop(again)
        return computed, slot, again

    computed, slot, again = served.runner.run(swapped())
    served.check("three", TEXTS[0], computed)
    assert slot == again
    assert set(served.engine.sizes) == set(served.slots.values())


def test_engine_keeps_a_held_prompt_in_its_slot_until_the_end(served: Served) -> None:
    async def held() -> tuple[int, int, int]:
        slot = await served.engine.put(served.prompts["three"], alone=False)
        with served.engine.held(slot):
            served.engine.drop(slot)
            other = await served.engine.put(served.prompts["one"], alone=False)
            split = served.asked("three", TEXTS[1]).split
            computed = await served.engine.compute(slot, split, timeout_s=30.0)
        served.check("three", TEXTS[1], computed)
        third = await served.engine.put(served.prompts["one"], alone=False)
        for used in (other, third):
            served.engine.drop(used)
        return slot, other, third

    slot, other, third = served.runner.run(held())
    assert slot != other
    assert third == slot


def test_engine_says_what_is_wrong_with_a_prompt_it_cannot_load(
    served: Served, tmp_path: Path
) -> None:
    with pytest.raises(ServingError, match="not there"):
        served.runner.run(served.engine.put(tmp_path / "nothing", alone=False))


def test_engine_refuses_to_start_on_another_backbone(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "backbone")
    choice = BackboneChoice(
        name=str(folder), revision=None, digest="sha256:" + "0" * 64, device="cpu",
        precision="fp32", language_model=False,
    )  # fmt: skip
    engine = Engine(choice, EngineConfig())

    async def start() -> None:
        try:
            await engine.start()
        finally:
            await engine.close()

    with pytest.raises(ServingError, match=r"backbone\.digest: expected"):
        asyncio.run(start())


def test_engine_that_closes_fails_what_still_waits(tmp_path: Path) -> None:
    made = Served(tmp_path)

    async def closed() -> list[Any]:
        await made.start()
        host = made.engine._host
        tasks = [asyncio.create_task(made.ask(*question)) for question in questions(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await made.engine.close()
        assert host is not None
        assert not host.process.is_alive()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = made.runner.run(closed())
    assert found
    assert all(isinstance(one, NotReadyError | ServingError) for one in found)
    with pytest.raises(NotReadyError):
        made.runner.run(made.ask("one", TEXTS[0]))
    made.runner.close()


def _children(pid: int | None) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
