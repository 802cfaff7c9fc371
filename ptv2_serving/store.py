"""Pull a prompt from the registry: two files, verified, then renamed into place.

Only `prompt.safetensors` and `prompt.json` are downloaded. A version holds code as well, for the
loading of MLflow itself; it is neither fetched nor run here.
"""

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptv2_core.artifact import FILES, MANIFEST_FILE, Manifest, load_manifest
from ptv2_core.config import Device
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import replace_directory, sha256_file
from ptv2_serving.tracking import (
    MANIFEST_TAG,
    PROMPT_PATH,
    SHA256_TAG,
    StoreError,
    check_answers,
    quiet_mlflow,
    resolve_uri,
    shown,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["Pulled", "Reference", "StoreError", "parse_reference", "pull"]

DEFAULT_ALIAS = "champion"
MAX_LISTED = 20

_NAME = r"[a-z][a-z0-9_-]{0,62}"
_REFERENCE = re.compile(
    rf"(?P<task>{_NAME})(?:@(?P<alias>{_NAME})|:(?P<version>[1-9][0-9]{{0,8}}))?"
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Which prompt: a task with an alias or a version, never both."""

    task: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        """Return the reference as it is written."""
        return f"{self.task}@{self.alias}" if self.alias else f"{self.task}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A prompt that is on this machine now.

    Attributes:
        reference: What was asked for.
        version: What it was resolved to.
        path: The folder with the two files.
        manifest: What the prompt says about itself.
        run_id: The run that registered it, where the registry says so.
    """

    reference: Reference
    version: int
    path: Path
    manifest: Manifest
    run_id: str | None


def parse_reference(text: str) -> Reference:
    """Read `TASK`, `TASK@ALIAS` or `TASK:VERSION`; a bare task means its champion.

    Raises:
        ConfigError: It is none of these.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"expected TASK, TASK@ALIAS or TASK:VERSION, such as intents@champion or intents:3 "
            f"(names of a-z, 0-9, _ and -, versions from 1), got {text!r}"
        )
    if match["version"]:
        return Reference(task=match["task"], version=int(match["version"]))
    return Reference(task=match["task"], alias=match["alias"] or DEFAULT_ALIAS)


def pull(
    reference: str,
    to: Path,
    *,
    tracking_uri: str,
    root: Path = Path(),
    backbone_name: str | None = None,
    device: Device = "auto",
) -> Pulled:
    """Download a prompt, verify it on its backbone, and put it at `to`.

    Args:
        reference: As for `parse_reference`.
        to: A folder; a prompt that is there already is replaced once the new one is verified.
        tracking_uri: The registry.
        root: Relative SQLite files lie under it.
        backbone_name: Where the backbone is on this machine, if not under the name it was trained
            with; its digest must be the same.
        device: Where to verify the golden inputs.

    Raises:
        ConfigError: The reference cannot be read.
        StoreError: The registry is away, has no such prompt, or `to` holds something else.
        ArtifactError: The files are not what the registry or the manifest says.
        BackboneError: The backbone is not on this machine, or is another one.
    """
    wanted = parse_reference(reference)
    _check_target(to)
    uri = resolve_uri(tracking_uri, root=root)
    check_answers(uri, must_exist=True)
    with _as_store_errors(uri), quiet_mlflow():
        client = _client(uri)
        version = _resolve(client, wanted, uri)
        source = client.get_model_version_download_uri(version.name, version.version)
        with replace_directory(to) as folder:
            _download(source, folder, uri)
            _verify(folder, version, backbone_name, device)
    return Pulled(
        reference=wanted,
        version=int(version.version),
        path=to,
        manifest=load_manifest(to),
        run_id=version.run_id or None,
    )


def _check_target(to: Path) -> None:
    """Refuse a place that holds anything but a prompt."""
    if to.is_dir():
        others = sorted(entry.name for entry in to.iterdir() if entry.name not in FILES)
        if others:
            raise StoreError(
                f"{to} is not replaced: expected nothing but {' and '.join(FILES)} in it, found "
                f"{', '.join(others[:3])}. Choose another folder."
            )
    elif to.exists() or to.is_symlink():
        raise StoreError(f"{to} is not replaced: expected a folder or nothing, found a file.")


def _verify(
    folder: Path, version: "ModelVersion", backbone_name: str | None, device: Device
) -> None:
    """Check the files against the registry's tag, then against the backbone itself."""
    manifest = load_manifest(folder)
    name = f"{version.name}:{version.version}"
    expected = version.tags.get(SHA256_TAG)
    if expected is None:
        raise ArtifactError(
            f"{name} has no tag {SHA256_TAG!r}, so nothing says which prompt it should be; "
            "expected a version made by `ptv2 register`."
        )
    if manifest.sha256 != expected:
        raise ArtifactError(
            f"{name}: the registry expects a prompt with sha256 {expected}, got {manifest.sha256}. "
            "The stored files were exchanged; register the prompt again, or pull another version."
        )
    described = sha256_file(folder / MANIFEST_FILE)
    if described != version.tags.get(MANIFEST_TAG, described):
        raise ArtifactError(
            f"{name}: the registry expects a {MANIFEST_FILE} with sha256 "
            f"{version.tags[MANIFEST_TAG]}, got {described}. The stored file was changed; register "
            "the prompt again, or pull another version."
        )
    if manifest.task.name != version.name:
        raise ArtifactError(
            f"{name}: expected a prompt for {version.name!r}, got one for {manifest.task.name!r}."
        )
    # Golden logits were computed in fp32; only fp32 can repeat them.
    predictor = Predictor.load(folder, backbone_name=backbone_name, device=device, precision="fp32")
    predictor.verify_golden()


def _download(source: str, folder: Path, uri: str) -> None:
    from mlflow.artifacts import download_artifacts

    for name in FILES:
        address = f"{source}/{PROMPT_PATH}/{name}"
        # MLflow draws a progress bar a file, and only the environment could turn that off.
        with redirect_stderr(io.StringIO()):
            download_artifacts(artifact_uri=address, dst_path=str(folder), tracking_uri=uri)
        if not (folder / name).is_file():
            raise ArtifactError(f"{source}/{PROMPT_PATH}: expected a file {name}, got none.")


def _resolve(client: "MlflowClient", wanted: Reference, uri: str) -> "ModelVersion":
    """Find the version; an error lists what there is."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(wanted.task)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(model.name for model in client.search_registered_models())
        raise StoreError(
            f"no prompt for the task {wanted.task!r} in the registry {shown(uri)}; there is: "
            f"{_listed(names)}."
        ) from error
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    number = aliases.get(wanted.alias) if wanted.alias else wanted.version
    if number is None:
        known = [f"@{alias} (version {at})" for alias, at in sorted(aliases.items())]
        raise StoreError(
            f"{wanted}: the task {wanted.task!r} has no alias {wanted.alias!r}; there is: "
            f"{_listed(known)}."
        )
    try:
        return client.get_model_version(wanted.task, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = client.search_model_versions(f"name = '{wanted.task}'")
        versions = sorted(int(version.version) for version in found)
        raise StoreError(
            f"{wanted}: the task {wanted.task!r} has no version {number}; there is: "
            f"{_listed([str(version) for version in versions])}."
        ) from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) + more) or "none"


def _client(uri: str) -> "MlflowClient":
    if not uri.startswith("http") and importlib.util.find_spec("sqlalchemy") is None:
        raise StoreError(
            f"the registry {shown(uri)} is a database, which needs the whole of MLflow: install "
            "`ptv2[pipelines]`, or name an MLflow server (http://...)."
        )
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _as_store_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow and its transports raise into one message for the user."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(
            f"the prompt could not be pulled from the registry {shown(uri)}: {lines[0]}"
        ) from error
