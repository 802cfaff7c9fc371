"""From inputs to answers with one resident prompt: text, engine, text again."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ptv2_serving.answering import Answer, Role, TooLongError
from ptv2_serving.engine.engine import Engine
from ptv2_serving.golden import check_decisions
from ptv2_serving.routes import Resident

GOLDEN_TIMEOUT_S = 60.0

Result = TypeVar("Result")


class Asker:
    """Asks the engine. Texts are read and answers made on one thread of their own.

    Tokenizers keep settings inside, and two threads would change them under each other.
    """

    def __init__(self, engine: Engine) -> None:
        """Ask an engine that has been started."""
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ptv2-text")

    async def ask(
        self,
        resident: Resident,
        role: Role,
        inputs: Sequence[Mapping[str, Any]],
        timeout_s: float,
        *,
        refuse_long: bool = False,
        yields: bool = False,
    ) -> Answer:
        """Answer inputs.

        Args:
            resident: Which prompt.
            role: In which part it is asked.
            inputs: As its task takes them.
            timeout_s: When to give up.
            refuse_long: Whether an input that would be cut is an error.
            yields: Whether to give way to other requests, see `Engine.compute`.

        Raises:
            DataError: An input is not what the task takes.
            TooLongError: See `refuse_long`.
            ServingError: As `Engine.compute`.
        """
        # from before the first wait: while a text is read, the slot could become another prompt's
        with self.engine.held(resident.slot):
            asked = await self._off_loop(lambda: resident.codec.encode(inputs))
            if refuse_long and any(asked.is_cut):
                raise TooLongError(
                    f"input {asked.is_cut.index(True) + 1} has more than the "
                    f"{resident.codec.max_length} tokens that version {resident.id.version} of "
                    f"{resident.id.task!r} reads; shorten it"
                )
            computed = await self.engine.compute(
                resident.slot, asked.split, timeout_s=timeout_s, yields=yields
            )
        predictions = await self._off_loop(lambda: resident.codec.decode(asked, computed.logits))
        return Answer(
            prompt=resident.id,
            role=role,
            predictions=predictions,
            truncated=asked.is_cut,
            queued_s=computed.queued_s,
            computed_s=computed.computed_s,
        )

    async def check_golden(self, resident: Resident) -> None:
        """Ask the golden inputs through the engine, as requests would.

        What the first request would wait for is then done.

        Raises:
            ServingError: They could not be computed.
            ArtifactError: In the engine's number format one has another answer.
        """
        golden = resident.manifest.golden
        if not golden:
            return
        codec = resident.codec
        asked = await self._off_loop(lambda: codec.encode([one["input"] for one in golden]))
        computed = await self.engine.compute(resident.slot, asked.split, timeout_s=GOLDEN_TIMEOUT_S)
        expected = [torch.tensor(one["logits"]) for one in golden]
        got = codec.logits_by_input(asked, computed.logits)
        check_decisions(codec.task.form, expected, got)

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
