"""The engine's answers are the predictor's, whatever else is asked and whoever dies."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptv2_core.config import Precision
from ptv2_core.errors import ArtifactError
from ptv2_serving.answering import (
    BusyError,
    DeadlineError,
    NotReadyError,
    ServingError,
    TooLongError,
)
from ptv2_serving.engine.engine import Engine, EngineConfig
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.engine.requests import Computed, Trial
from tests.serving.engine_parts import TEXTS, Served, questions
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("engine"), processes=2, queue_rows=256, batch_rows=16)
    made.runner.run(made.start())
    yield made
    made.runner.run(made.engine.close())
    made.runner.close()


@pytest.fixture
def served(opened: Served) -> Served:
    # a test before may have ended processes
    opened.runner.run(opened.whole())
    return opened


class Deadly(np.ndarray[Any, Any]):
    """Tokens that end the process which reads them."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


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
    host = served.engine.pool.host
    assert host is not None
    assert len(_children(host.process.pid)) == 2


def test_engine_survives_the_death_of_all_processes_under_load(served: Served) -> None:
    async def killed() -> list[Computed]:
        tasks = [asyncio.create_task(served.ask(*question)) for question in questions(200)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        host = served.engine.pool.host
        assert host is not None
        for pid in _children(host.process.pid):
            os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    before = served.engine.pool.restarts
    found = served.runner.run(killed())
    for (name, text), computed in zip(questions(200), found, strict=True):
        served.check(name, text, computed)
    assert served.engine.pool.restarts - before == 2


def test_engine_loads_the_backbone_anew_when_its_host_died(served: Served) -> None:
    async def killed() -> Computed:
        host = served.engine.pool.host
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
        poison = replace(split, input_ids=split.input_ids.view(Deadly))
        tasks = [served.engine.compute(served.slots["one"], poison, timeout_s=60.0)]
        # fewer than fill a batch: none is given to a process behind the one that ends it
        tasks += [served.ask(*question, timeout_s=60.0) for question in questions(10)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = served.engine.pool.restarts
    failed, *found = served.runner.run(poisoned())
    assert isinstance(failed, ServingError)
    assert "the process that computed it ended" in str(failed)
    for (name, text), computed in zip(questions(10), found, strict=True):
        served.check(name, text, computed)
    # in a batch with others, then alone once for each process
    assert served.engine.pool.restarts - before == 3


def test_engine_loses_no_process_to_a_row_that_cannot_be_computed(served: Served) -> None:
    async def mixed() -> list[Any]:
        split = served.asked("one", TEXTS[0]).split
        # no such token: the backbone's table of embeddings ends before it
        wrong = replace(split, input_ids=split.input_ids + 1_000_000)
        tasks = [served.engine.compute(served.slots["one"], wrong, timeout_s=60.0)]
        tasks += [served.ask(*question, timeout_s=60.0) for question in questions(20)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = served.engine.pool.restarts
    failed, *found = served.runner.run(mixed())
    assert isinstance(failed, ServingError)
    assert "IndexError" in str(failed)
    for (name, text), computed in zip(questions(20), found, strict=True):
        served.check(name, text, computed)
    assert served.engine.pool.restarts == before


def test_engine_refuses_a_request_of_more_rows_than_one_may_have(served: Served) -> None:
    split = served.predictors["one"].codec.encode([{"text": "play"}] * 2049).split
    with pytest.raises(TooLongError, match="at most 2,048 rows in a request .* got 2,049"):
        served.runner.run(served.engine.compute(served.slots["one"], split, timeout_s=30.0))


def test_engine_drops_a_prompt_once_however_often_it_is_told(served: Served) -> None:
    async def dropped() -> list[int]:
        slot = await served.engine.put(served.prompts["three"], alone=False)
        with served.engine.held(slot):
            served.engine.drop(slot)
            served.engine.drop(slot)  # it is leaving already
        served.engine.drop(slot)  # it has gone
        served.engine.drop(10_000)  # it never was
        puts = [served.engine.put(served.prompts[name], alone=False) for name in ("one", "three")]
        slots = list(await asyncio.gather(*puts))
        for name, own in zip(("one", "three"), slots, strict=True):
            split = served.asked(name, TEXTS[1]).split
            served.check(name, TEXTS[1], await served.engine.compute(own, split, timeout_s=30.0))
            served.engine.drop(own)
        return slots

    first, second = served.runner.run(dropped())
    assert first != second


def test_engine_tries_a_prompt_in_every_process_before_it_is_resident(served: Served) -> None:
    name, asked = "two", served.asked("two", TEXTS[1])
    seen: list[Computed] = []

    def check(logits: Any) -> None:
        seen.append(Computed(logits=logits, queued_s=0.0, computed_s=0.0))

    def refuse(logits: Any) -> None:
        raise ArtifactError("golden input 1 has another answer")

    async def tried() -> None:
        slot = await served.engine.put(
            served.prompts[name], alone=False, trial=Trial(split=asked.split, check=check)
        )
        served.engine.drop(slot)

    async def refused() -> None:
        trial = Trial(split=asked.split, check=refuse)
        await served.engine.put(served.prompts[name], alone=False, trial=trial)

    served.runner.run(tried())
    assert len(seen) == 2
    for found in seen:
        served.check(name, TEXTS[1], found)
    with pytest.raises(ArtifactError, match="another answer"):
        served.runner.run(refused())
    assert set(served.engine.sizes) == set(served.slots.values())


def test_engine_tries_a_prompt_before_the_rows_that_wait(served: Served) -> None:
    async def tried() -> list[bool]:
        host, workers = served.engine.pool.host, served.engine.pool.ready
        assert host is not None
        pids = _children(host.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            many = [asyncio.create_task(served.ask("one", TEXTS[1])) for _ in range(250)]
            while sum(len(worker.batches) for worker in workers) < 4:
                await asyncio.sleep(0)
            trial = Trial(split=served.asked("two", TEXTS[1]).split, check=lambda logits: None)
            put = asyncio.create_task(
                served.engine.put(served.prompts["two"], alone=False, trial=trial)
            )
            while not all(worker.calls for worker in workers):
                await asyncio.sleep(0)
            sent = [set(worker.batches) for worker in workers]
            are_left: list[bool] = []

            def note(place: int, _: object) -> None:
                are_left.append(set(workers[place].batches) == sent[place])

            for place, worker in enumerate(workers):
                (answer,) = worker.calls.values()
                answer.add_done_callback(partial(note, place))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        served.engine.drop(await put)
        await asyncio.gather(*many)
        return are_left

    # each process was sent two batches and then the prompt, and answered that first
    assert served.runner.run(tried()) == [True, True]


def test_engine_drops_what_a_joining_process_does_not_hold_yet(served: Served) -> None:
    async def restarted() -> None:
        host = served.engine.pool.host
        assert host is not None
        spare = await served.engine.put(served.prompts["three"], alone=False)
        pid = _children(host.process.pid)[0]
        os.kill(pid, signal.SIGKILL)
        while len(served.engine.pool.workers) == len(served.engine.pool.ready):
            await asyncio.sleep(0.005)
        served.engine.drop(spare)
        while served.engine.num_ready < 2:
            await asyncio.sleep(0.01)

    served.runner.run(asyncio.wait_for(restarted(), 60.0))
    found = served.runner.run(served.ask("two", TEXTS[1]))
    served.check("two", TEXTS[1], found)


def test_engine_replaces_a_process_whose_host_died_before(served: Served) -> None:
    async def killed() -> None:
        pool = served.engine.pool
        assert pool.host is not None
        children = _children(pool.host.process.pid)
        os.kill(pool.host.process.pid or 0, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert served.engine.num_ready == 2  # they go on without it
        os.kill(children[0], signal.SIGKILL)
        while served.engine.num_ready == 2:
            await asyncio.sleep(0.01)
        while served.engine.num_ready < 2:
            await asyncio.sleep(0.05)

    served.runner.run(asyncio.wait_for(killed(), 60.0))
    served.check("one", TEXTS[0], served.runner.run(served.ask("one", TEXTS[0])))


def test_engine_starts_as_many_processes_as_before_when_all_died(served: Served) -> None:
    async def killed() -> tuple[int, int]:
        pool = served.engine.pool
        before = pool.host
        assert before is not None
        for pid in [before.process.pid, *(worker.pid for worker in pool.workers)]:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        while pool.host is before or served.engine.num_ready < 2:
            await asyncio.sleep(0.05)
        await asyncio.sleep(2.0)
        assert pool.host is not None
        return len(pool.workers), len(_children(pool.host.process.pid))

    assert served.runner.run(asyncio.wait_for(killed(), 60.0)) == (2, 2)


def test_engine_gives_a_new_process_thousands_of_prompts_without_blocking(tmp_path: Path) -> None:
    made = Served(tmp_path)
    longest = 0.0

    async def watched() -> None:
        nonlocal longest
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)

    async def restarted() -> Computed:
        await made.start()
        # as if they had been put one by one
        made.engine._resident.update(dict.fromkeys(range(10, 2510), made.prompts["one"]))
        host = made.engine.pool.host
        assert host is not None
        watching = asyncio.create_task(watched())
        os.kill(_children(host.process.pid)[0], signal.SIGKILL)
        await asyncio.sleep(0.1)
        found = await made.ask("two", TEXTS[1], timeout_s=90.0)
        watching.cancel()
        split = made.asked("one", TEXTS[0]).split
        made.check("one", TEXTS[0], await made.engine.compute(2509, split, timeout_s=30.0))
        return found

    made.check("two", TEXTS[1], made.runner.run(asyncio.wait_for(restarted(), 120.0)))
    assert longest < 1.0
    made.runner.run(made.engine.close())
    made.runner.close()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_engine_answers_as_offline_in_the_same_number_format(
    tmp_path: Path, precision: Precision
) -> None:
    made = Served(tmp_path, precision=precision)

    async def asked() -> list[Computed]:
        await made.start()
        return await asyncio.gather(*(made.ask(*question) for question in questions(24)))

    found = made.runner.run(asked())
    offline = made.predictors["one"].model.backbone
    assert made.engine.backbone["precision"] == offline.number_format
    assert made.engine.backbone["answering_digest"] == offline.answering_digest
    for (name, text), computed in zip(questions(24), found, strict=True):
        # sums in bf16 depend on the rows beside
        made.check(name, text, computed, tolerance=0.03)
    made.runner.run(made.engine.close())
    made.runner.close()


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
        host = made.engine.pool.host
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
