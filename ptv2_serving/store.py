"""Pull a prompt from the registry: two files, verified, then renamed into place.

Only `prompt.safetensors` and `prompt.json` are downloaded. A version holds code as well, for the
loading of MLflow itself; it is neither fetched nor run here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptv2_core.config import Device
from ptv2_core.errors import ArtifactError, DataError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import replace_directory
from ptv2_core.manifest import FILES, Manifest, load_manifest
from ptv2_serving import signing
from ptv2_serving.references import Reference, parse_reference
from ptv2_serving.resolving import resolve
from ptv2_serving.sources import download
from ptv2_serving.tracking import (
    StoreError,
    as_store_errors,
    check_answers,
    connect,
    quiet_mlflow,
    resolve_uri,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["Pulled", "Reference", "StoreError", "golden_check", "parse_reference", "pull"]


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


def pull(
    reference: str,
    to: Path,
    *,
    tracking_uri: str,
    root: Path = Path(),
    backbone_name: str | None = None,
    device: Device = "auto",
    public_key: "Ed25519PublicKey | None" = None,
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
        public_key: Of those who may sign; None takes unsigned prompts, too.

    Raises:
        ConfigError: The reference cannot be read.
        StoreError: The registry is away, has no such prompt, or `to` holds something else.
        ArtifactError: The files are not what the registry or the manifest says, or not signed.
        BackboneError: The backbone is not on this machine, or is another one.
    """
    wanted = parse_reference(reference)
    _check_target(to)
    uri = resolve_uri(tracking_uri, root=root)
    check_answers(uri, must_exist=True)
    with as_store_errors(uri, "the prompt could not be pulled"), quiet_mlflow():
        version, run_id = resolve(connect(uri), wanted, uri)
    if public_key is not None:
        signing.check(version, public_key)
    verify = golden_check(backbone_name=backbone_name, device=device)
    with replace_directory(to) as folder:
        verify(folder, download(version, folder, uri=uri))
    return Pulled(
        reference=wanted,
        version=version.version,
        path=to,
        manifest=load_manifest(to),
        run_id=run_id,
    )


def golden_check(
    *, backbone_name: str | None = None, device: Device = "auto"
) -> Callable[[Path, Manifest], None]:
    """Return a check that a downloaded prompt computes on its backbone what it should.

    It loads the backbone each time; a server, which has it already, brings a check of its own.

    Args:
        backbone_name: Where the backbone is, if not under the name it was trained with.
        device: Where to compute.
    """

    def verify(folder: Path, manifest: Manifest) -> None:
        # Golden logits were computed in fp32; only fp32 can repeat them.
        predictor = Predictor.load(
            folder, backbone_name=backbone_name, device=device, precision="fp32"
        )
        try:
            predictor.verify_golden()
        except DataError as error:
            raise ArtifactError(
                f"the golden inputs of {manifest.task.name!r} are none of its task: {error}"
            ) from error

    return verify


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
