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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptv2_core.bounded import parse_json, read_bounded
from ptv2_core.errors import ArtifactError
from ptv2_core.files import fsync_path, write_json_atomic
from ptv2_core.manifest import FILES, Manifest
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

DOWNLOAD_S = 30.0
"""For both files of a prompt: nothing else is fetched or looked at meanwhile."""

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


class Scratch:
    """A new folder on the store's disk that is locked while its process lives."""

    def __init__(self, incoming: Path) -> None:
        """Make it in `incoming`."""
        with _locked_folder(incoming, fcntl.LOCK_EX):
            self.path = Path(tempfile.mkdtemp(dir=incoming))
            self._descriptor: int | None = os.open(
                self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove it, unless it was renamed; once is enough."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A version's files, checked; whoever has them computes something with them, then commits.

    Attributes:
        version: Which.
        path: The folder with the two files.
        manifest: What it says about itself.
        scratch: Holds a new download; None: it is in the store already.
    """

    version: ResolvedVersion
    path: Path
    manifest: Manifest
    scratch: Scratch | None = None

    @property
    def is_stored(self) -> bool:
        """Whether it is in the store already, where only verified prompts are."""
        return self.scratch is None

    def close(self) -> None:
        """Remove a download that was not committed."""
        if self.scratch is not None:
            self.scratch.close()


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
        staged = self.stage(version)
        try:
            if not staged.is_stored:
                verify(staged.path, staged.manifest)
            path = self.commit(staged)
        finally:
            staged.close()
        return Stored(
            prompt=version.prompt,
            path=path,
            manifest=staged.manifest,
            downloaded=not staged.is_stored,
        )

    def stage(
        self, version: ResolvedVersion, *, is_over: Callable[[], bool] = lambda: False
    ) -> Staged:
        """Return a version's files, downloaded if they are not here, whole and undamaged.

        Args:
            version: Which.
            is_over: Asked now and then during a download, which ends once it says so.

        Raises:
            ArtifactError: The files are not the version's, no prompt, or not signed.
            StoreError: The files cannot be had in time, or not be written.
        """
        if self._public_key is not None:
            signing.check(version, self._public_key)
        found = self._open(self._objects / version.manifest_sha256, version)
        if found is not None:
            return found
        with self._writing(version):
            scratch = Scratch(self._incoming)
            try:
                manifest = download(
                    version, scratch.path, uri=self._uri, within_s=DOWNLOAD_S, is_over=is_over
                )
            except BaseException:
                scratch.close()
                raise
        return Staged(version=version, path=scratch.path, manifest=manifest, scratch=scratch)

    def commit(self, staged: Staged) -> Path:
        """Rename a verified download into place; return its folder in the store.

        Raises:
            StoreError: It cannot be.
        """
        target = self._objects / staged.version.manifest_sha256
        if not staged.is_stored:
            with self._writing(staged.version):
                self._put(staged.path, target, staged.version)
        return target

    def kept(self, staged: Staged) -> Staged:
        """Return what was committed, as it lies in the store."""
        target = self._objects / staged.version.manifest_sha256
        return replace(staged, path=target, scratch=None)

    @contextmanager
    def _writing(self, version: ResolvedVersion) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{version} cannot be stored in {self._folder}: {error}") from error

    def remember(self, routings: Mapping[str, Routing], *, failed: Collection[str] = ()) -> None:
        """Keep these as the last that were known to be good, through a power cut, too.

        Args:
            routings: By task; they take the place of all that were remembered.
            failed: Tasks beside these of which what was remembered stays.

        Raises:
            StoreError: They cannot be written.
        """
        if failed:
            with suppress(ArtifactError):  # one that cannot be read is no more
                known = self.last_known()
                routings = {task: known[task] for task in failed if task in known} | {**routings}
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
                with closing(Scratch(self._incoming)) as aside:
                    target.rename(aside.path / target.name)
                removed += 1
        return removed

    def _open(self, target: Path, version: ResolvedVersion) -> Staged | None:
        """Return an object that is there and undamaged."""
        try:
            # `collect` looks at this time under the same lock
            with _locked_folder(self._objects, fcntl.LOCK_SH):
                os.utime(target)
            manifest = check_files(target, version)
            check_numbers(target, manifest)
        except (ArtifactError, StoreError, OSError):
            return None
        return Staged(version=version, path=target, manifest=manifest)

    def _put(self, folder: Path, target: Path, version: ResolvedVersion) -> None:
        """Rename a verified download into place, unless another process was faster."""
        with _locked_folder(self._objects, fcntl.LOCK_EX):
            if target.exists():
                with suppress(ArtifactError, StoreError, OSError):
                    check_files(target, version)
                    return
                with closing(Scratch(self._incoming)) as aside:
                    target.rename(aside.path / "damaged")
            folder.rename(target)
            os.utime(target)

    def _flush(self, target: Path) -> None:
        # one that is not here, such as a canary that was refused, is nothing to keep
        with suppress(FileNotFoundError):
            for name in FILES:
                fsync_path(target / name)
            fsync_path(target)

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
