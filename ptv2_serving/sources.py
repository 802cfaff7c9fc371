"""Where a registry keeps files: a folder, an MLflow server, or a store that MLflow knows.

A folder is read as one, and a server is asked without MLflow's pools of threads: for two small
files they cost more than the files. Redirects are not followed, since what came with a request
would go to another host.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ptv2_core.bounded import parse_json
from ptv2_core.errors import ArtifactError
from ptv2_core.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest, load_manifest
from ptv2_serving.checks import (
    CHUNK_BYTES,
    Entry,
    check_listing,
    check_manifest,
    check_numbers,
    check_sizes,
    open_folder,
    read_chunks,
    write_bounded,
)
from ptv2_serving.routing import ResolvedVersion
from ptv2_serving.tracking import (
    PROMPT_PATH,
    REQUEST_RETRIES,
    REQUEST_TIMEOUT_S,
    StoreError,
    StoreUnreachableError,
    as_store_errors,
    quiet_mlflow,
    shown,
)

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

MAX_LISTING_BYTES = 2**16
MAX_TRANSFER_S = 300.0
MLFLOW_FILES = "/api/2.0/mlflow-artifacts/artifacts"


@dataclass(frozen=True, kw_only=True)
class _Files:
    """A version's files, before any is read.

    Attributes:
        entries: What is there.
        read: Gives the bytes of a name.
        where: Named in errors.
    """

    entries: Iterable[Entry]
    read: Callable[[str], Iterator[bytes]]
    where: str


class _Patience:
    """How long a download may go on.

    Attributes:
        within_s: Seconds from now.
    """

    def __init__(self, within_s: float, is_over: Callable[[], bool]) -> None:
        """Begin to count."""
        self.within_s = within_s
        self._until_s = time.monotonic() + within_s
        self._is_over = is_over

    def check(self, what: str) -> None:
        """Refuse to go on once the time is over, or nobody waits any more.

        Raises:
            StoreUnreachableError: It is.
        """
        if self._is_over():
            raise StoreUnreachableError(f"{what}: given up, as the server is closing")
        if time.monotonic() > self._until_s:
            raise StoreUnreachableError(
                f"{what}: not there within {self.within_s:g} seconds; it is tried again later"
            )


def download(
    version: ResolvedVersion,
    folder: Path,
    *,
    uri: str,
    within_s: float = MAX_TRANSFER_S,
    is_over: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Put a version's two files into an empty folder, checking as they come.

    Args:
        version: Which.
        folder: Where.
        uri: The registry.
        within_s: For all of it, where a server is asked.
        is_over: Asked now and then; the download ends once it says so.

    Returns:
        The manifest; files, digests, shapes and numbers were checked.

    Raises:
        ArtifactError: They are not what the registry says.
        StoreError: They cannot be had.
    """
    with _open(version, folder, uri, _Patience(within_s, is_over)) as files:
        sizes = check_listing(files.entries, files.where)
        target = folder / MANIFEST_FILE
        found = write_bounded(files.read(target.name), target, most_bytes=sizes[target.name])
        manifest = check_manifest(target, version, found)
        write_bounded(
            files.read(WEIGHTS_FILE),
            folder / WEIGHTS_FILE,
            most_bytes=check_sizes(manifest, sizes, version),
        )
    manifest = load_manifest(folder)
    check_numbers(folder, manifest)
    return manifest


@contextmanager
def _open(
    version: ResolvedVersion, scratch: Path, uri: str, patience: _Patience
) -> Iterator[_Files]:
    """Open a version's files where its source says they are."""
    local = local_folder(version.source)
    if local is not None:
        folder = local / PROMPT_PATH
        try:
            with open_folder(folder) as (descriptor, entries):
                yield _Files(
                    entries=entries,
                    read=lambda name: read_chunks(descriptor, name),
                    where=f"{version} in {folder}",
                )
        except OSError as error:
            raise StoreError(f"{version} could not be copied from {folder}: {error}") from error
        return
    with as_store_errors(uri, f"{version} could not be downloaded"), quiet_mlflow():
        scheme = urlsplit(version.source).scheme
        if scheme in ("mlflow-artifacts", "http", "https"):
            yield _on_server(version, uri, patience)
        else:
            yield _elsewhere(version, scratch, uri)


def local_folder(source: str) -> Path | None:
    """Return the folder that a source names; None where it is not on this machine.

    Raises:
        ArtifactError: It is on this machine, but no absolute path without `..`.
    """
    parts = urlsplit(source)
    if len(parts.scheme) > 0 and parts.scheme != "file":
        return None
    path = unquote(parts.path) if parts.scheme else source
    pure = PurePosixPath(path)
    if (
        parts.netloc not in ("", "localhost")
        or not pure.is_absolute()
        or ".." in pure.parts
        or not path.isprintable()
    ):
        raise ArtifactError(
            f"the registry says that the files lie in {source!r}; expected an absolute path"
        )
    return Path(path)


def _on_server(version: ResolvedVersion, uri: str, patience: _Patience) -> _Files:
    """Ask the registry's own server."""
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
    from mlflow.utils.credentials import get_default_host_creds

    server, source = urlsplit(uri), urlsplit(version.source)
    own = (server.hostname, server.port)
    if server.scheme not in ("http", "https") or (
        source.netloc and (source.hostname, source.port) != own
    ):
        raise StoreError(
            f"{version}: its files lie on {shown(version.source)}, which is not the registry "
            f"{shown(uri)}; what opens the registry is not sent to another server."
        )
    address = version.source
    if source.scheme == "mlflow-artifacts":
        address = MlflowArtifactsRepository.resolve_uri(version.source, uri)  # type: ignore[no-untyped-call]
    base, found, root = address.partition(MLFLOW_FILES)
    parts = PurePosixPath(unquote(root)).parts
    if not found or ".." in parts:
        raise StoreError(f"{version}: expected files of MLflow's server, got {version.source!r}")
    creds = get_default_host_creds(base)  # type: ignore[no-untyped-call]
    folder = f"{root.strip('/')}/{PROMPT_PATH}"

    def listing() -> Iterator[Entry]:
        answer = _get(creds, MLFLOW_FILES, patience, params={"path": folder})
        data = b"".join(_bounded(answer, MAX_LISTING_BYTES))
        listed = parse_json(data, f"{version}: the list of its files")
        files = listed.get("files") if isinstance(listed, dict) else None
        for entry in files if isinstance(files, list) else []:
            known = entry if isinstance(entry, dict) else {}
            yield Entry(
                name=str(known.get("path")),
                is_file=known.get("is_dir", False) is False,
                size_bytes=known.get("file_size"),
            )

    return _Files(
        entries=listing(),
        read=lambda name: _get(creds, f"{MLFLOW_FILES}/{folder}/{name}", patience),
        where=f"{version} on {shown(uri)}",
    )


def _get(creds: Any, endpoint: str, patience: _Patience, **how: Any) -> Iterator[bytes]:
    """Yield what a server answers, as it is on the wire."""
    from mlflow.utils.rest_utils import http_request
    from urllib3.exceptions import HTTPError

    what = endpoint.rpartition("/")[2]
    patience.check(what)
    response = http_request(  # type: ignore[no-untyped-call]
        creds,
        f"/{endpoint.lstrip('/')}",
        "GET",
        stream=True,
        timeout=REQUEST_TIMEOUT_S,
        max_retries=REQUEST_RETRIES,
        allow_redirects=False,
        raise_on_status=False,
        extra_headers={"Accept-Encoding": "identity"},
        **how,
    )
    with closing(response):
        if response.status_code != 200:
            kind = StoreUnreachableError if response.status_code >= 500 else StoreError
            raise kind(
                f"{what}: expected the file, got HTTP "
                f"{response.status_code}; the registry may have lost it, or not let you in."
            )
        # a few compressed bytes can become any number of them
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ArtifactError(f"{endpoint}: expected plain bytes, got compressed ones")
        try:
            # as much as there is at once: a server that drips must not hold us in one call
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
                patience.check(what)
                yield chunk
        except HTTPError as error:
            raise StoreUnreachableError(f"{what}: {error}") from error


def _bounded(chunks: Iterable[bytes], most_bytes: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > most_bytes:
            raise ArtifactError(f"expected a list of at most {most_bytes:,} bytes, got more")
        yield chunk


def _elsewhere(version: ResolvedVersion, scratch: Path, uri: str) -> _Files:
    """Ask a store that MLflow has an adapter for, such as S3."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository: ArtifactRepository = get_artifact_repository(version.source, tracking_uri=uri)

    def listing() -> Iterator[Entry]:
        for found in repository.list_artifacts(PROMPT_PATH):
            name = str(found.path).removeprefix(f"{PROMPT_PATH}/")
            yield Entry(name=name, is_file=not found.is_dir, size_bytes=found.file_size)

    def read(name: str) -> Iterator[bytes]:
        # such an adapter writes files only
        file = scratch / f".{name}.part"
        try:
            part = f"{PROMPT_PATH}/{name}"
            repository._download_file(part, str(file))  # type: ignore[no-untyped-call]
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
        finally:
            file.unlink(missing_ok=True)

    return _Files(entries=listing(), read=read, where=f"{version} in {version.source}")
