"""From a version of the registry to a prompt that answers: checked, loaded, stored."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ptv2_serving.engine.engine import Engine
from ptv2_serving.loading import Loader, Prepared
from ptv2_serving.routes import Resident
from ptv2_serving.routing import ResolvedVersion

Result = TypeVar("Result")


class Admitter:
    """Makes versions resident. What blocks runs on one thread of its own."""

    def __init__(self, engine: Engine, loader: Loader) -> None:
        """Load into an engine that has been started."""
        self._engine = engine
        self._loader = loader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ptv2-load")

    async def admit(self, version: ResolvedVersion) -> Resident:
        """Fetch a version, see that it answers as it should, store it.

        All of its files were checked before it is loaded anywhere. Then its golden inputs are
        computed in fp32, and by the engine, at the same time; whatever goes wrong, nothing is left
        of it, in the engine or in the store.

        Raises:
            StoreError: It cannot be had, or not be stored.
            ArtifactError: It is not what the registry says, or computes something else.
            BackboneError: It is for another backbone.
            ServingError: The engine could not load it.
        """
        prepared = await self.in_loader(lambda: self._loader.prepare(version))
        try:
            return await self._admit(version, prepared)
        finally:
            self._loader.discard(prepared)

    async def _admit(self, version: ResolvedVersion, prepared: Prepared) -> Resident:
        putting = asyncio.get_running_loop().create_task(
            self._engine.put(prepared.path, alone=prepared.alone, trial=prepared.trial)
        )
        try:
            await self.in_loader(lambda: self._loader.verify(prepared))
            slot = await putting
            folder = await self.in_loader(lambda: self._loader.keep(prepared))
        except BaseException:
            putting.add_done_callback(self._undo)
            putting.cancel()
            raise
        self._engine.move(slot, folder)
        return Resident(
            id=version.prompt,
            manifest=prepared.manifest,
            codec=prepared.codec,
            slot=slot,
            folder=folder.name,
        )

    def _undo(self, putting: "asyncio.Task[int]") -> None:
        # one that was cancelled or failed has left nothing
        if not putting.cancelled() and putting.exception() is None:
            self._engine.drop(putting.result())

    async def in_loader(self, work: Callable[[], Result]) -> Result:
        """Run something that blocks on the thread that loads."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Let the thread end as soon as it can."""
        self._loader.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
