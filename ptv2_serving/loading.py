"""From a version of the registry to a prompt that is on this machine, verified, ready to load."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_core.artifact import Manifest
from ptv2_core.evaluation.codec import Codec
from ptv2_core.evaluation.inputs import input_fields
from ptv2_serving.backbone import Verifier
from ptv2_serving.objects import Objects
from ptv2_serving.routing import ResolvedVersion, Routing

# fields of inputs that are lists, or numbers, in an example that no prompt brought
LISTS = ("tokens", "choices", "entities", "options", "names")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A verified prompt.

    Attributes:
        path: The folder with its two files.
        manifest: What it says about itself.
        codec: What stands before and behind the model for it.
        alone: Whether its rows share a batch with no other prompt's.
    """

    path: Path
    manifest: Manifest
    codec: Codec
    alone: bool


class Loader:
    """Fetches into the local store, and verifies on the backbone. Used by one thread at a time."""

    def __init__(self, objects: Objects, verifier: Verifier) -> None:
        """Use a store and a verifier."""
        self.verifier = verifier
        self._objects = objects
        self._ready: dict[ResolvedVersion, Prepared] = {}

    def prefetch(self, version: ResolvedVersion) -> None:
        """Prepare a version for the next `prepare`; errors as there."""
        self._ready[version] = self.prepare(version)

    def prepare(self, version: ResolvedVersion) -> Prepared:
        """Return a version, downloaded and verified if it was not before.

        Raises:
            StoreError: It cannot be had.
            ArtifactError: It is not what the registry says, or not for this backbone.
            BackboneError: The backbone is not on this machine, or is another one.
        """
        ready = self._ready.pop(version, None)
        if ready is not None:
            return ready
        stored = self._objects.fetch(version, self.verifier.verify)
        predictor = self.verifier.predictor(stored.path, stored.manifest)
        return Prepared(
            path=stored.path,
            manifest=stored.manifest,
            codec=predictor.codec,
            alone=stored.manifest.method == "prompt_tuning",
        )

    def remember(self, routings: Mapping[str, Routing], resident: set[str]) -> None:
        """Keep what is served as the last known to be good, and remove what nothing needs.

        Args:
            routings: By task.
            resident: Names of folders that a process of the engine may read again.

        Raises:
            StoreError: It cannot be written.
        """
        self._objects.remember(routings)
        self._objects.collect(resident)


def example_of(manifest: Manifest) -> Mapping[str, Any]:
    """Return an input as a task takes it: its first golden one, or one made of its fields."""
    if manifest.golden:
        example: Mapping[str, Any] = manifest.golden[0]["input"]
        return example
    fields = input_fields(manifest.task).needed
    return {field: ["one", "two"] if field in LISTS else "..." for field in fields}
