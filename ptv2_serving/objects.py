"""A local store of verified prompts, each under the sha256 of its prompt.json.

    FOLDER/objects/SHA256/{prompt.json,prompt.safetensors}
    FOLDER/incoming/...      what is being downloaded or removed
    FOLDER/routes.json       the last routing that was known to be good

Several processes may share one, if they serve the same tasks. A name is its content, so whoever
comes second finds the same; and a damaged object is noticed when it is opened, and fetched again.
That is why a download is only flushed to the disk by `remember`, off the way to the first answer.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptv2_core.artifact import FILES, Manifest
from ptv2_core.bounded import parse_json, read_bounded
from ptv2_core.errors import ArtifactError
from ptv2_core.files import fsync_path, write_json_atomic
from ptv2_serving import signing
from ptv2_serving.answering import PromptId
from ptv2_serving.checks import check_files, check_numbers
from ptv2_serving.routing import ResolvedVersion, Routing
from ptv2_serving.sources import download
from ptv2_serving.tracking import StoreError, resolve_uri

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

KEEP_S = 3600.0
"""How long after its last opening an object is kept that nothing names."""

MAX_ROUTES_BYTES = 2**26
ROUTES_VERSION = 1

Verify = Callable[[Path, Manifest], None]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A verified prompt on this machine.

    Attributes:
        prompt: Which.
        path: The folder with its two files; read them soon, or name them in `remember`.
        manifest: What it says about itself.
        downloaded: Whether this call brought it.
    """

    prompt: PromptId
    path: Path
    manifest: Manifest
    downloaded: bool


class Objects:
    """The store in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        tracking_uri: str,
        root: Path = Path(),
        public_key: "Ed25519PublicKey | None" = None,
    ) -> None:
        """Open the store; remove what killed processes left half done.

        Args:
            folder: Made if it is not there, for this user alone.
            tracking_uri: The registry that versions are fetched from.
            root: Relative SQLite files lie under it.
            public_key: Of those who may sign; None takes unsigned prompts, too.

        Raises:
            StoreError: The folder cannot be made, or the registry's address is none.
        """
        self._folder = folder.absolute()
        self._uri = resolve_uri(tracking_uri, root=root)
        self._public_key = public_key
        self._durable: set[str] = set()
        try:
            for place in (self._folder, self._objects, self._incoming):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store {folder} cannot be made: {error}") from error
        self._clean()

    @property
    def _objects(self) -> Path:
        return self._folder / "objects"

    @property
    def _incoming(self) -> Path:
        return self._folder / "incoming"

    @property
    def _routes(self) -> Path:
        return self._folder / "routes.json"

    def fetch(self, version: ResolvedVersion, verify: Verify) -> Stored:
        """Return a version, downloading it if it is not here, whole and undamaged.

        Args:
            version: Which.
            verify: Is given the folder and manifest of a new download, and raises where they do
                not compute what they should. What is here already went through it.

        Raises:
            ArtifactError: The files are not the version's, no prompt, or not signed. What was in
                the store stays.
            StoreError: The files cannot be had, or not be stored.
        """
        if self._public_key is not None:
            signing.check(version, self._public_key)
        target = self._objects / version.manifest_sha256
        found = self._open(target, version)
        if found is not None:
            return found
        try:
            with self._scratch() as folder:
                manifest = download(version, folder, uri=self._uri)
                verify(folder, manifest)
                self._put(folder, target, version)
        except OSError as error:
            raise StoreError(f"{version} cannot be stored in {self._folder}: {error}") from error
        return Stored(prompt=version.prompt, path=target, manifest=manifest, downloaded=True)

    def remember(self, routings: Mapping[str, Routing]) -> None:
        """Keep these as the last that were known to be good, through a power cut, too.

        Args:
            routings: By task; they take the place of all that were remembered.

        Raises:
            StoreError: They cannot be written.
        """
        tasks = {task: routing.to_mapping() for task, routing in sorted(routings.items())}
        try:
            new = _digests(routings) - self._durable
            for digest in new:
                self._flush(self._objects / digest)
            fsync_path(self._objects)
            self._durable |= new
            write_json_atomic(self._routes, {"version": ROUTES_VERSION, "tasks": tasks})
        except OSError as error:
            raise StoreError(f"{self._routes} cannot be written: {error}") from error

    def last_known(self) -> dict[str, Routing]:
        """Return what was remembered last, by task; nothing where nothing was.

        Raises:
            ArtifactError: The file is damaged, or of another version.
        """
        if not self._routes.exists():
            return {}
        data = read_bounded(self._routes, MAX_ROUTES_BYTES)
        values = parse_json(data, self._routes, most_bytes=MAX_ROUTES_BYTES)
        if (
            not isinstance(values, dict)
            or values.get("version") != ROUTES_VERSION
            or not isinstance(values.get("tasks"), dict)
        ):
            raise ArtifactError(
                f"{self._routes}: expected routes of version {ROUTES_VERSION}, got something else; "
                "remove the file, and start while the registry answers"
            )
        return {task: Routing.from_mapping(task, given) for task, given in values["tasks"].items()}

    def collect(self, keep: set[str]) -> int:
        """Remove objects that nothing names, and return how many.

        What was opened within the last hour stays, since another process may be about to load
        it; so does what `remember` names.

        Args:
            keep: sha256 of the prompt.json of those to keep.

        Raises:
            ArtifactError: What was remembered cannot be read, so nothing is removed.
        """
        self._clean()
        kept = keep | _digests(self.last_known())
        removed = 0
        for target in sorted(self._objects.iterdir()):
            if target.name in kept:
                continue
            with _locked_folder(self._objects, fcntl.LOCK_EX), suppress(FileNotFoundError):
                if time.time() - target.stat().st_mtime < KEEP_S:
                    continue
                with self._scratch() as folder:
                    target.rename(folder / target.name)
                removed += 1
        return removed

    def _open(self, target: Path, version: ResolvedVersion) -> Stored | None:
        """Return an object that is there and undamaged."""
        try:
            # `collect` looks at this time under the same lock
            with _locked_folder(self._objects, fcntl.LOCK_SH):
                os.utime(target)
            manifest = check_files(target, version)
            check_numbers(target, manifest)
        except (ArtifactError, StoreError, OSError):
            return None
        return Stored(prompt=version.prompt, path=target, manifest=manifest, downloaded=False)

    def _put(self, folder: Path, target: Path, version: ResolvedVersion) -> None:
        """Rename a verified download into place, unless another process was faster."""
        with _locked_folder(self._objects, fcntl.LOCK_EX):
            if target.exists():
                with suppress(ArtifactError, StoreError, OSError):
                    check_files(target, version)
                    return
                with self._scratch() as aside:
                    target.rename(aside / "damaged")
            folder.rename(target)
            os.utime(target)

    def _flush(self, target: Path) -> None:
        # one that is not here, such as a canary that was refused, is nothing to keep
        with suppress(FileNotFoundError):
            for name in FILES:
                fsync_path(target / name)
            fsync_path(target)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Yield a folder on the same disk that is locked while its process lives."""
        with _locked_folder(self._incoming, fcntl.LOCK_EX):
            folder = Path(tempfile.mkdtemp(dir=self._incoming))
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            os.close(descriptor)
            shutil.rmtree(folder, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what nobody holds any more."""
        with _locked_folder(self._incoming, fcntl.LOCK_EX):
            for folder in self._incoming.iterdir():
                with suppress(OSError), _locked_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_folder(folder: Path, how: int) -> Iterator[None]:
    """Hold a lock on a folder; the operating system lets go when the process dies."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder, flags)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _digests(routings: Mapping[str, Routing]) -> set[str]:
    return {
        version.manifest_sha256
        for routing in routings.values()
        for version in routing.versions.values()
    }
