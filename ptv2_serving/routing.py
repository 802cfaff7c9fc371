"""Which versions of a task answer, as the registry wishes it: plain values, checked when read."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ptv2_core.bounded import is_whole
from ptv2_core.errors import ArtifactError
from ptv2_serving.answering import PromptId
from ptv2_serving.references import is_task_name
from ptv2_serving.tracking import MANIFEST_TAG, SHA256_TAG, SIGNATURE_TAG

MAX_VERSION = 999_999_999
MAX_SOURCE = 4096
MAX_SIGNATURE = 200

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ResolvedVersion:
    """A version of a prompt, and all that is needed to fetch exactly that one.

    Attributes:
        task: What it answers.
        version: In the registry.
        prompt_sha256: Of its prompt.safetensors.
        manifest_sha256: Of its prompt.json, which names the other; so it covers both.
        source: Where the registry keeps the version's files.
        signature: Of `manifest_sha256`, base64; None: it is not signed.
    """

    task: str
    version: int
    prompt_sha256: str
    manifest_sha256: str
    source: str
    signature: str | None = None

    def __post_init__(self) -> None:
        """Check what came from a registry or a file."""
        is_line = isinstance(self.source, str) and self.source.isprintable()
        problems = [
            f"{name}: expected {wanted}, got {str(getattr(self, name))[:80]!r}"
            for name, wanted, is_right in (
                ("task", "a task's name", is_task_name(self.task)),
                ("version", "a whole number", is_whole(self.version, 1, MAX_VERSION)),
                ("prompt_sha256", "64 hexadecimal digits", _is_sha256(self.prompt_sha256)),
                ("manifest_sha256", "64 hexadecimal digits", _is_sha256(self.manifest_sha256)),
                ("source", "an address", is_line and 0 < len(self.source) <= MAX_SOURCE),
                ("signature", "base64", _is_short(self.signature)),
            )
            if not is_right
        ]
        if problems:
            raise ArtifactError(f"version {self.version} of {self.task!r}: {'; '.join(problems)}")

    @classmethod
    def of_tags(
        cls, task: str, version: int, *, tags: Mapping[str, str], source: str
    ) -> "ResolvedVersion":
        """Make it from what a registry says.

        Raises:
            ArtifactError: The version was not made by `ptv2 register`, or is malformed.
        """
        for tag in (SHA256_TAG, MANIFEST_TAG):
            if tag not in tags:
                raise ArtifactError(
                    f"{task}:{version} has no tag {tag!r}, so nothing says which prompt it should "
                    "be; expected a version made by `ptv2 register`."
                )
        return cls(
            task=task,
            version=version,
            prompt_sha256=tags[SHA256_TAG],
            manifest_sha256=tags[MANIFEST_TAG],
            source=source,
            signature=tags.get(SIGNATURE_TAG),
        )

    @property
    def prompt(self) -> PromptId:
        """Which prompt it is."""
        return PromptId(task=self.task, version=self.version, digest=self.prompt_sha256)

    def __str__(self) -> str:
        """Return it as it is written in references."""
        return f"{self.task}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the registry wishes to answer a task.

    Attributes:
        task: Which.
        champion: The version that answers.
        canary: The version that answers a share of the requests, or None.
        canary_share: In percent, 0 to 100.
        shadow: The version that is asked without being heard, or None.
        versions: Each of these versions, by its number.
    """

    task: str
    champion: int
    canary: int | None
    canary_share: float
    shadow: int | None
    versions: Mapping[int, ResolvedVersion]

    def to_mapping(self) -> dict[str, Any]:
        """Return the plain values that files store."""
        return {
            "champion": self.champion,
            "canary": self.canary,
            "canary_share": self.canary_share,
            "shadow": self.shadow,
            "versions": [asdict(version) for version in self.versions.values()],
        }

    @classmethod
    def from_mapping(cls, task: str, values: Any) -> "Routing":
        """Read what `to_mapping` gave.

        Raises:
            ArtifactError: It is something else.
        """
        keys = {"champion", "canary", "canary_share", "shadow", "versions"}
        if not isinstance(values, dict) or values.keys() != keys:
            raise ArtifactError(f"{task}: expected a mapping of {', '.join(sorted(keys))}")
        listed, share = values["versions"], values["canary_share"]
        fields = set(ResolvedVersion.__dataclass_fields__)
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and entry.keys() == fields for entry in listed
        ):
            raise ArtifactError(f"{task}: expected versions with {', '.join(sorted(fields))}")
        versions = {entry["version"]: ResolvedVersion(**entry) for entry in listed}
        named = [values["champion"], values["canary"], values["shadow"]]
        if (
            not is_task_name(task)
            or named[0] is None
            or any(not is_whole(n) or n not in versions for n in named if n is not None)
            or any(version.task != task for version in versions.values())
            or not is_share(share)
        ):
            raise ArtifactError(f"{task}: expected a champion, a canary and a shadow among them")
        return cls(task=task, **{**values, "versions": versions})


def is_share(value: Any) -> bool:
    """Tell whether it is a percentage."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_short(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_SIGNATURE)
