"""From a version of the registry to a prompt whose files are on this machine, ready to load."""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptv2_core.errors import ArtifactError, DataError, PTv2Error
from ptv2_core.evaluation.codec import Codec
from ptv2_core.evaluation.inputs import input_fields
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.manifest import Manifest
from ptv2_serving.backbone import Verifier
from ptv2_serving.engine.requests import Trial
from ptv2_serving.golden import check_decisions
from ptv2_serving.objects import Objects, Staged
from ptv2_serving.routing import ResolvedVersion, Routing

# fields of inputs that are lists, or numbers, in an example that no prompt brought
LISTS = ("tokens", "choices", "entities", "options", "names")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prompt whose files are those of its version; what it computes is not checked yet.

    Attributes:
        staged: Its files.
        predictor: It on the fp32 backbone; None: its golden inputs were computed before.
        codec: What stands before and behind the model for it.
        trial: Its golden inputs, for the engine; None where it has none.
    """

    staged: Staged
    predictor: Predictor | None
    codec: Codec
    trial: Trial | None

    @property
    def path(self) -> Path:
        """The folder with its two files, until it is kept."""
        return self.staged.path

    @property
    def manifest(self) -> Manifest:
        """What it says about itself."""
        return self.staged.manifest

    @property
    def alone(self) -> bool:
        """Whether its rows share a batch with no other prompt's."""
        return self.manifest.method == "prompt_tuning"


class Loader:
    """Fetches into the local store, and verifies on the backbone. Used by one thread at a time."""

    def __init__(self, objects: Objects, verifier: Verifier) -> None:
        """Use a store and a verifier."""
        self.verifier = verifier
        self._objects = objects
        self._ready: dict[ResolvedVersion, Prepared | PTv2Error] = {}
        self._is_closing = threading.Event()

    def prefetch(self, version: ResolvedVersion) -> None:
        """Fetch, verify and keep a version; the next `prepare` returns it, or raises the same."""
        try:
            prepared = self.prepare(version)
            try:
                self.verify(prepared)
                self.keep(prepared)
            finally:
                self.discard(prepared)
        except PTv2Error as error:
            self._ready[version] = error
            raise
        # its weights are not needed again, and there may be thousands
        self._ready[version] = Prepared(
            staged=self._objects.kept(prepared.staged),
            predictor=None,
            codec=prepared.codec,
            trial=prepared.trial,
        )

    def prepare(self, version: ResolvedVersion) -> Prepared:
        """Return a version whose files are here and checked; `verify` and `keep` follow.

        Raises:
            StoreError: It cannot be had.
            ArtifactError: It is not what the registry says, or not for this backbone.
            BackboneError: The backbone is not on this machine, or is another one.
        """
        ready = self._ready.pop(version, None)
        if isinstance(ready, PTv2Error):
            raise ready
        if ready is not None:
            return ready
        staged = self._objects.stage(version, is_over=self._is_closing.is_set)
        try:
            predictor = self.verifier.predictor(staged.path, staged.manifest)
            return Prepared(
                staged=staged,
                predictor=None if staged.is_stored else predictor,
                codec=self.verifier.codec(predictor, staged.manifest),
                trial=_trial_of(staged.manifest, predictor),
            )
        except BaseException:
            staged.close()
            raise

    def verify(self, prepared: Prepared) -> None:
        """Compare a new prompt's golden inputs with the fp32 backbone.

        Raises:
            ArtifactError: They have other logits here.
        """
        if prepared.predictor is not None:
            prepared.predictor.verify_golden()

    def keep(self, prepared: Prepared) -> Path:
        """Put a verified prompt into the store; return its folder there.

        Raises:
            StoreError: It cannot be stored.
        """
        return self._objects.commit(prepared.staged)

    def discard(self, prepared: Prepared) -> None:
        """Remove the files of a prompt that was not kept."""
        prepared.staged.close()

    def remember(
        self, routings: Mapping[str, Routing], resident: set[str], *, failed: Collection[str] = ()
    ) -> None:
        """Keep what is served as the last known to be good, and remove what nothing needs.

        Args:
            routings: By task.
            resident: Names of folders that a process of the engine may read again.
            failed: Tasks of which the last known is kept, as they are not served for a fault.

        Raises:
            StoreError: It cannot be written.
        """
        self._objects.remember(routings, failed=failed)
        self._objects.collect(resident)

    def close(self) -> None:
        """Give up what is being downloaded; may be called from another thread."""
        self._is_closing.set()


def _trial_of(manifest: Manifest, predictor: Predictor) -> Trial | None:
    """Return the golden inputs as the engine computes them.

    Raises:
        ArtifactError: They are no inputs of the task.
    """
    # not the predictor: this is kept for as long as a start takes, and it has weights
    golden, codec = manifest.golden, predictor.codec
    if not golden:
        return None
    try:
        asked = codec.encode([one["input"] for one in golden])
    except DataError as error:
        raise ArtifactError(
            f"the golden inputs of {manifest.task.name!r} are none of its task: {error}"
        ) from error
    expected = [torch.tensor(one["logits"]) for one in golden]

    def check(logits: Sequence[Tensor]) -> None:
        check_decisions(manifest.task.form, expected, codec.logits_by_input(asked, logits))

    return Trial(split=asked.split, check=check)


def example_of(manifest: Manifest) -> Mapping[str, Any]:
    """Return an input as a task takes it: its first golden one, or one made of its fields."""
    if manifest.golden:
        example: Mapping[str, Any] = manifest.golden[0]["input"]
        return example
    fields = input_fields(manifest.task).needed
    return {field: ["one", "two"] if field in LISTS else "..." for field in fields}
