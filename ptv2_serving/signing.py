"""Signatures of prompts: a private key vouches for a prompt.json, and that for the weights.

What is signed is a line of text with the sha256 of prompt.json, so the file itself need not be
there. The file names its task and the weights' sha256, but not its version in the registry.
"""

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptv2_core.bounded import read_bounded
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_serving.routing import ResolvedVersion

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

MAX_KEY_BYTES = 2**14
MADE_BY = "openssl genpkey -algorithm ed25519 -out FILE"


def message(manifest_sha256: str) -> bytes:
    """Return the bytes that are signed."""
    return f"ptv2 prompt.json sha256:{manifest_sha256}\n".encode()


def sign(manifest_sha256: str, key: "Ed25519PrivateKey") -> str:
    """Return a signature as base64."""
    return base64.b64encode(key.sign(message(manifest_sha256))).decode("ascii")


def check(version: ResolvedVersion, key: "Ed25519PublicKey") -> None:
    """Check the signature of a version.

    Raises:
        ArtifactError: It has none, or one of somebody else or for other files.
    """
    from cryptography.exceptions import InvalidSignature

    if version.signature is None:
        raise ArtifactError(
            f"{version}: expected a signed prompt, got one without a signature; sign it with "
            f"`ptv2 sign {version} --key FILE`."
        )
    try:
        signature = base64.b64decode(version.signature, validate=True)
        key.verify(signature, message(version.manifest_sha256))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise ArtifactError(
            f"{version}: its signature is not by the key that is trusted here, or not for the "
            f"prompt.json with sha256 {version.manifest_sha256}. Sign it again, or do not use it."
        ) from error


def read_private_key(file: Path) -> "Ed25519PrivateKey":
    """Read a private key in PEM or as ssh-keygen writes it, without a passphrase.

    Raises:
        ConfigError: It cannot be read, or is no Ed25519 key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_ssh_private_key,
    )

    data = _read(file)
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else load_pem_private_key
    key = _loaded(lambda: load(data, password=None), file, "private")
    if not isinstance(key, Ed25519PrivateKey):
        raise _wrong(file, "private", type(key).__name__.strip("_"))
    return key


def read_public_key(file: Path) -> "Ed25519PublicKey":
    """Read a public key in PEM or as ssh-keygen writes it.

    Raises:
        ConfigError: It cannot be read, or is no Ed25519 key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_public_key,
        load_ssh_public_key,
    )

    data = _read(file)
    load = load_ssh_public_key if data.startswith(b"ssh-") else load_pem_public_key
    key = _loaded(lambda: load(data), file, "public")
    if not isinstance(key, Ed25519PublicKey):
        raise _wrong(file, "public", type(key).__name__.strip("_"))
    return key


def _read(file: Path) -> bytes:
    try:
        return read_bounded(file, MAX_KEY_BYTES)
    except ArtifactError as error:
        raise ConfigError(f"{file}: the key cannot be read; {error}") from error


def _loaded(load: Any, file: Path, kind: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except TypeError as error:
        # what the library raises where a passphrase is wanted
        raise ConfigError(f"{file}: expected a key without a passphrase ({error})") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _wrong(file, kind, "something else") from error


def _wrong(file: Path, kind: str, got: str) -> ConfigError:
    how = MADE_BY if kind == "private" else "openssl pkey -in FILE -pubout"
    return ConfigError(
        f"{file}: expected a {kind} Ed25519 key in PEM, got {got}; `{how}` makes one"
    )
