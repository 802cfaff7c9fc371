"""From inputs to answers with one resident prompt: text, engine, text again."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ptv2_core.data.tasks import TaskSpec
from ptv2_serving.answering import Answer, DeadlineError, Role, TooLongError
from ptv2_serving.engine.engine import Engine
from ptv2_serving.routes import Resident

Result = TypeVar("Result")


class Asker:
    """Asks the engine. Texts are read and answers made on one thread of their own.

    Tokenizers keep settings inside, and two threads would change them under each other.
    """

    def __init__(self, engine: Engine) -> None:
        """Ask an engine that has been started."""
        self.engine = engine
        # of the requests whose texts are being read, or wait for it
        self._coming_rows = 0
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
            TooLongError: See `refuse_long`; or they are more rows than a request may have.
            ServingError: As `Engine.compute`.
        """
        try:
            # reading texts and making answers wait for their thread, so they count as well
            async with asyncio.timeout(timeout_s):
                return await self._ask(
                    resident, role, inputs, timeout_s, refuse_long=refuse_long, yields=yields
                )
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s:g} s; ask again later") from error

    async def _ask(
        self,
        resident: Resident,
        role: Role,
        inputs: Sequence[Mapping[str, Any]],
        timeout_s: float,
        *,
        refuse_long: bool,
        yields: bool,
    ) -> Answer:
        codec = resident.codec
        rows = _rows_at_least(codec.task, inputs)
        # before a text is read: that takes longer than to refuse it
        self.engine.check_room(rows, coming=self._coming_rows, yields=yields)
        # from before the first wait: while a text is read, the slot could become another prompt's
        with self.engine.held(resident.slot):
            self._coming_rows += rows
            try:
                asked = await self._off_loop(lambda: codec.encode(inputs))
            finally:
                self._coming_rows -= rows
            if refuse_long and any(asked.is_cut):
                raise TooLongError(
                    f"input {asked.is_cut.index(True) + 1} has more than the "
                    f"{codec.max_length} tokens that version {resident.id.version} of "
                    f"{resident.id.task!r} reads; shorten it"
                )
            computed = await self.engine.compute(
                resident.slot, asked.split, timeout_s=timeout_s, yields=yields
            )
        predictions = await self._off_loop(lambda: codec.decode(asked, computed.logits))
        return Answer(
            prompt=resident.id,
            role=role,
            predictions=predictions,
            truncated=asked.is_cut,
            queued_s=computed.queued_s,
            computed_s=computed.computed_s,
        )

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _rows_at_least(task: TaskSpec, inputs: Sequence[Mapping[str, Any]]) -> int:
    """Return how many rows inputs become, as far as it shows before they are read."""
    if task.form != "options":
        return len(inputs)
    # a row an option; whatever list is the longest holds them
    lengths = ([len(own) for own in given.values() if isinstance(own, list)] for given in inputs)
    return sum(max(own, default=1) or 1 for own in lengths)
