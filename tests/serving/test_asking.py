"""What is refused before a text is read, and when a request is given up."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ptv2_serving.answering import BusyError, DeadlineError, PromptId, TooLongError
from ptv2_serving.asking import Asker
from ptv2_serving.engine.engine import Engine, EngineConfig
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.routes import Resident
from tests.serving.service_parts import spec

READING_S = 0.3


class SlowCodec:
    """Takes its time to read texts, and fails then: no engine is there to answer."""

    max_length = 16

    def __init__(self, kind: Any) -> None:
        self.task = spec("tiny", kind)
        self.read = 0

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> Any:
        self.read += 1
        time.sleep(READING_S)
        raise ZeroDivisionError


class Asking:
    """An asker whose engine takes four rows, and has no process."""

    def __init__(self, kind: str = "classification") -> None:
        choice = BackboneChoice(
            name="none", revision=None, digest="", device="cpu", precision="fp32",
            language_model=False,
        )  # fmt: skip
        self.asker = Asker(Engine(choice, EngineConfig(queue_rows=4, request_rows=8)))
        self.codec = SlowCodec(kind)
        manifest, codec = SimpleNamespace(), self.codec
        self.resident = Resident(
            id=PromptId(task="tiny", version=1, digest=""),
            manifest=manifest,  # type: ignore[arg-type]
            codec=codec,  # type: ignore[arg-type]
            slot=0,
            folder="",
        )

    async def ask(self, *inputs: Mapping[str, Any], timeout_s: float = 5.0, **how: Any) -> None:
        await self.asker.ask(self.resident, "champion", inputs, timeout_s, **how)


def test_asking_gives_up_in_time_while_texts_are_read() -> None:
    async def asked() -> float:
        made = Asking()
        first = asyncio.create_task(made.ask({"text": "one"}))
        await asyncio.sleep(0)
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=r"no answer within 0\.05 s"):
            await made.ask({"text": "two"}, timeout_s=0.05)
        waited = time.monotonic() - began
        with pytest.raises(ZeroDivisionError):
            await first
        await asyncio.sleep(0.05)
        assert made.codec.read == 1  # nobody waited for the second one any more
        made.asker.close()
        return waited

    assert asyncio.run(asked()) < READING_S


def test_asking_counts_texts_that_wait_to_be_read_as_rows_that_wait() -> None:
    async def asked() -> None:
        made = Asking()
        tasks = [asyncio.create_task(made.ask(*[{"text": "a"}] * 2)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="4 rows wait already, 4 at most"):
            await made.ask({"text": "b"})
        await asyncio.gather(*tasks, return_exceptions=True)
        assert made.codec.read == 2
        # they wait no longer
        with pytest.raises(ZeroDivisionError):
            await made.ask({"text": "b"})
        made.asker.close()

    asyncio.run(asked())


def test_asking_reads_nothing_for_a_shadow_when_it_is_busy() -> None:
    async def asked() -> None:
        made = Asking()
        first = asyncio.create_task(made.ask(*[{"text": "a"}] * 2))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 rows wait already, 2 at most"):
            await made.ask({"text": "b"}, yields=True)
        await asyncio.gather(first, return_exceptions=True)
        assert made.codec.read == 1
        made.asker.close()

    asyncio.run(asked())


def test_asking_refuses_too_many_choices_before_it_reads_them() -> None:
    async def asked() -> None:
        made = Asking("multiple_choice")
        given = {"text": "it rained", "choices": ["a"] * 5}
        with pytest.raises(TooLongError, match="at most 8 rows in a request .* got 10"):
            await made.ask(given, given)
        assert made.codec.read == 0
        made.asker.close()

    asyncio.run(asked())
