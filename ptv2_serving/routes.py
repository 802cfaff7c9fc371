"""Which resident prompt answers a request."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptv2_core.evaluation.codec import Codec
from ptv2_core.manifest import Manifest
from ptv2_serving.answering import PromptId, Role, UnknownTaskError
from ptv2_serving.guard import Record

# of the hash of a request's id: fine enough for hundredths of a percent
SHARES = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """A prompt that is loaded and checked.

    Attributes:
        id: Which.
        manifest: What it says about itself.
        codec: What stands before and behind the model for it.
        slot: Of the engine.
        folder: The name of its folder in the store.
    """

    id: PromptId
    manifest: Manifest
    codec: Codec
    slot: int
    folder: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """What is loaded for a task. A swap puts another route in its place, in one reference.

    Attributes:
        champion: What answers.
        canary: What answers a share of the requests, or None.
        canary_share: In percent.
        shadow: What is asked beside the champion, or None.
        warm: Earlier prompts, latest first.
        records: The latest requests of champion and canary since the canary came.
    """

    champion: Resident
    canary: Resident | None = None
    canary_share: float = 0.0
    shadow: Resident | None = None
    warm: tuple[Resident, ...] = ()
    records: dict[Role, Record] = field(
        default_factory=lambda: {"champion": Record(), "canary": Record()}
    )

    def residents(self) -> Iterator[Resident]:
        """Yield all that is loaded, each once."""
        seen = set()
        for resident in (self.champion, self.canary, self.shadow, *self.warm):
            if resident is not None and resident.id not in seen:
                seen.add(resident.id)
                yield resident

    def choose(self, request_id: str, version: int | None) -> tuple[Resident, Role]:
        """Return what answers a request.

        Args:
            request_id: The same id gets the same answerer for as long as the route stays.
            version: Which to ask, whatever the aliases say; None: what they say.

        Raises:
            UnknownTaskError: The version is not loaded.
        """
        if version is None:
            if self.canary is not None and share_of(request_id) < self.canary_share:
                return self.canary, "canary"
            return self.champion, "champion"
        for resident in self.residents():
            if resident.id.version == version:
                return resident, self.role(resident)
        loaded = ", ".join(str(resident.id.version) for resident in self.residents())
        raise UnknownTaskError(
            f"version {version} of {self.champion.id.task!r} is not loaded; loaded are: {loaded}."
        )

    def role(self, resident: Resident) -> Role:
        """Return in which part a resident is; one that is kept warm stands in for the champion."""
        if self.canary is not None and resident.id == self.canary.id:
            return "canary"
        if self.shadow is not None and resident.id == self.shadow.id:
            return "shadow"
        return "champion"


def share_of(request_id: str) -> float:
    """Return where an id stands, from 0 to below 100; the same in every process."""
    digest = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % SHARES * 100 / SHARES
