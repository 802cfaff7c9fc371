"""What is checked of files that are downloaded, besides what every loader of a prompt checks.

A prompt is exactly two plain files. Names, kinds and sizes are looked at before a byte is read, and
no more bytes are written than were announced.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptv2_core.artifact import load_weights
from ptv2_core.bounded import MAX_JSON_BYTES
from ptv2_core.errors import ArtifactError
from ptv2_core.files import sha256_file
from ptv2_core.manifest import (
    FILES,
    MANIFEST_FILE,
    MAX_TUNED_BYTES,
    WEIGHTS_FILE,
    Manifest,
    largest_weights,
    load_manifest,
    read_manifest,
)
from ptv2_serving.routing import ResolvedVersion
from ptv2_serving.tracking import StoreError

CHUNK_BYTES = 2**20
MAX_ENTRIES = 16
"""Files in a listing at most; a prompt has two."""

LARGEST = {MANIFEST_FILE: MAX_JSON_BYTES, WEIGHTS_FILE: MAX_TUNED_BYTES}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A name in a listing of a version's files.

    Attributes:
        name: As the listing has it.
        is_file: Whether it is a plain file.
        size_bytes: What the listing says; None: nothing.
    """

    name: str
    is_file: bool
    size_bytes: int | None


def check_listing(entries: Iterable[Entry], where: str) -> dict[str, int]:
    """Accept exactly the two files of a prompt.

    Args:
        entries: What is there.
        where: Named in errors.

    Returns:
        The size of each, or the largest it may have where the listing does not say.

    Raises:
        ArtifactError: Another name, a link, a folder, a file too many, too few or too large.
    """
    found: dict[str, int] = {}
    for entry in entries:
        if entry.name not in FILES or entry.name in found:
            raise ArtifactError(
                f"{where}: expected {' and '.join(FILES)}, found {entry.name[:100]!r}; a prompt is "
                "these two files and nothing else. Register it again."
            )
        if not entry.is_file:
            raise ArtifactError(
                f"{where}: expected a plain file {entry.name}, found a link, a folder or something "
                "else. Put the file itself there."
            )
        most = LARGEST[entry.name]
        size = most if entry.size_bytes is None else entry.size_bytes
        if type(size) is not int or not 0 < size <= most:
            raise ArtifactError(
                f"{where}: {entry.name}: expected 1 to {most:,} bytes, got {size!r}"
            )
        found[entry.name] = size
    for name in FILES:
        if name not in found:
            raise ArtifactError(f"{where}: expected a file {name}, found none.")
    return found


@contextmanager
def open_folder(folder: Path) -> Iterator[tuple[int, list[Entry]]]:
    """Open a folder that is not a link, and list it.

    Yields:
        A descriptor of it, under which names are opened, and what is in it.

    Raises:
        StoreError: There is nothing.
        ArtifactError: There is something else.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise StoreError(f"{folder}: not there; expected a folder with a prompt") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: expected a folder with a prompt ({error})") from error
    try:
        yield descriptor, list(_entries(descriptor, folder))
    finally:
        os.close(descriptor)


def _entries(descriptor: int, folder: Path) -> Iterator[Entry]:
    with os.scandir(descriptor) as found:
        for count, entry in enumerate(found, start=1):
            if count > MAX_ENTRIES:
                raise ArtifactError(
                    f"{folder}: expected {' and '.join(FILES)}, found more than {MAX_ENTRIES} files"
                )
            status = entry.stat(follow_symlinks=False)
            # a second name is a second way to change the file after it was checked
            is_file = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            yield Entry(name=entry.name, is_file=is_file, size_bytes=status.st_size)


def read_chunks(descriptor: int, name: str) -> Iterator[bytes]:
    """Yield the bytes of a plain file under an open folder; no link is followed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=descriptor), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ArtifactError(f"{name}: expected a plain file")
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def write_bounded(chunks: Iterable[bytes], target: Path, *, most_bytes: int) -> str:
    """Write a new file, and give up once there are more bytes than there should be.

    Args:
        chunks: The bytes.
        target: The file; it must not be there.
        most_bytes: At most so many.

    Returns:
        The hexadecimal sha256 of what was written.

    Raises:
        ArtifactError: There were more.
    """
    digest, written = hashlib.sha256(), 0
    with target.open("xb") as stream:
        for chunk in chunks:
            written += len(chunk)
            if written > most_bytes:
                raise ArtifactError(
                    f"{target.name}: expected at most {most_bytes:,} bytes, got more; the stored "
                    "file is not the one that was registered."
                )
            digest.update(chunk)
            stream.write(chunk)
    return digest.hexdigest()


def check_manifest(file: Path, version: ResolvedVersion, found_sha256: str) -> Manifest:
    """Check a downloaded prompt.json before the weights are asked for.

    Args:
        file: Where it is.
        version: What it should be.
        found_sha256: Of the file.

    Raises:
        ArtifactError: It is not what the registry says, or no manifest.
    """
    if found_sha256 != version.manifest_sha256:
        raise ArtifactError(
            f"{version}: the registry expects a {MANIFEST_FILE} with sha256 "
            f"{version.manifest_sha256}, got {found_sha256}. The stored file was changed; register "
            "the prompt again, or pull another version."
        )
    manifest = read_manifest(file)
    check_names(manifest, version)
    return manifest


def check_names(manifest: Manifest, version: ResolvedVersion) -> None:
    """Check that a manifest is that of a version.

    Raises:
        ArtifactError: It names other weights or another task.
    """
    if manifest.sha256 != version.prompt_sha256:
        raise ArtifactError(
            f"{version}: the registry expects a prompt with sha256 {version.prompt_sha256}, got "
            f"{manifest.sha256}. The stored files were exchanged; register the prompt again, or "
            "pull another version."
        )
    if manifest.task.name != version.task:
        raise ArtifactError(
            f"{version}: expected a prompt for {version.task!r}, got one for "
            f"{manifest.task.name!r}."
        )


def check_sizes(manifest: Manifest, sizes: Mapping[str, int], version: ResolvedVersion) -> int:
    """Return how many bytes of weights to take at most.

    Raises:
        ArtifactError: The listing announces more than the manifest's shapes can need.
    """
    most, announced = largest_weights(manifest), sizes[WEIGHTS_FILE]
    if LARGEST[WEIGHTS_FILE] > announced > most:
        raise ArtifactError(
            f"{version}: {WEIGHTS_FILE}: expected at most {most:,} bytes for {manifest.shapes()}, "
            f"got {announced:,}"
        )
    return min(most, announced)


def check_files(folder: Path, version: ResolvedVersion) -> Manifest:
    """Check both files of a version where they are: names, sizes, sha256, shapes, numbers.

    Raises:
        ArtifactError: They are not the version's, or no prompt.
    """
    with open_folder(folder) as (_, entries):
        check_listing(entries, str(folder))
    manifest = load_manifest(folder)
    check_names(manifest, version)
    found = sha256_file(folder / MANIFEST_FILE)
    if found != version.manifest_sha256:
        raise ArtifactError(
            f"{folder / MANIFEST_FILE}: expected sha256 {version.manifest_sha256}, got {found}; "
            "the file was changed or damaged."
        )
    return manifest


def check_numbers(folder: Path, manifest: Manifest) -> None:
    """Check that all weights are finite.

    Raises:
        ArtifactError: One is not.
    """
    load_weights(folder, manifest)
