import base64
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_serving import signing
from ptv2_serving.routing import ResolvedVersion
from tests.serving.store_parts import Kept, accept, open_store
from tests.tiny import tiny_artifact, tiny_backbone

# fixed, since every process of a test run must name the cases alike
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
DIGEST = "ab" * 32


def version_of(signature, digest=DIGEST):
    return ResolvedVersion(
        task="tiny",
        version=1,
        prompt_sha256="cd" * 32,
        manifest_sha256=digest,
        source="/nowhere",
        signature=signature,
    )


def write_private(file, kind, key=KEY, encryption=None):
    how = encryption or NoEncryption()
    file.write_bytes(key.private_bytes(Encoding.PEM, kind, how))
    return file


def test_signing_own_signature_is_accepted():
    signing.check(version_of(signing.sign(DIGEST, KEY)), KEY.public_key())


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (None, "expected a signed prompt, got one without a signature"),
        (signing.sign(DIGEST, OTHER), "not by the key that is trusted"),
        (signing.sign("ac" * 32, KEY), "not for the prompt.json with sha256 abab"),
        ("", "not by the key"),
        ("not base64 \u00e9", "not by the key"),
        (signing.sign(DIGEST, KEY)[:-4], "not by the key"),
    ],
    ids=["none", "another key", "another prompt", "empty", "no base64", "cut"],
)
def test_signing_other_signatures_are_refused(signature, message):
    with pytest.raises(ArtifactError, match=message):
        signing.check(version_of(signature), KEY.public_key())


@pytest.mark.parametrize("kind", [PrivateFormat.PKCS8, PrivateFormat.OpenSSH])
def test_signing_reads_private_keys_of_openssl_and_ssh_keygen(tmp_path, kind):
    read = signing.read_private_key(write_private(tmp_path / "key", kind))
    assert read.public_key() == KEY.public_key()


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        (Encoding.OpenSSH, PublicFormat.OpenSSH),
    ],
)
def test_signing_reads_public_keys_of_openssl_and_ssh_keygen(tmp_path, encoding, kind):
    file = tmp_path / "key.pub"
    file.write_bytes(KEY.public_key().public_bytes(encoding, kind))
    assert signing.read_public_key(file) == KEY.public_key()


def test_signing_refuses_a_key_with_a_passphrase(tmp_path):
    locked = BestAvailableEncryption(b"secret")
    file = write_private(tmp_path / "key", PrivateFormat.PKCS8, encryption=locked)
    with pytest.raises(ConfigError, match="expected a key without a passphrase"):
        signing.read_private_key(file)


def test_signing_refuses_what_is_no_ed25519_key(tmp_path):
    rsa = generate_private_key(public_exponent=65537, key_size=2048)
    file = write_private(tmp_path / "key", PrivateFormat.PKCS8, rsa)
    with pytest.raises(ConfigError, match="expected a private Ed25519 key in PEM, got RSA"):
        signing.read_private_key(file)
    with pytest.raises(ConfigError, match="expected a public Ed25519 key in PEM, got something"):
        signing.read_public_key(file)
    with pytest.raises(ConfigError, match="the key cannot be read"):
        signing.read_private_key(tmp_path / "absent")


def test_signing_openssl_checks_our_signature(tmp_path):
    """An independent program agrees on what is signed and how."""
    try:
        subprocess.run(["openssl", "version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl here")
    public, line, detached = (tmp_path / name for name in ("key.pub", "line", "signature"))
    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(pem)
    line.write_text(f"ptv2 prompt.json sha256:{DIGEST}\n")
    detached.write_bytes(base64.b64decode(signing.sign(DIGEST, KEY)))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    done = subprocess.run(
        [*command, "-in", str(line), "-sigfile", str(detached)], capture_output=True, text=True
    )
    assert "Signature Verified Successfully" in done.stdout


def test_signing_store_with_a_key_takes_only_what_is_signed(tmp_path):
    artifact = tiny_artifact(tmp_path / "prompt", tiny_backbone(tmp_path / "backbone"))
    kept, store = Kept(tmp_path, artifact), open_store(tmp_path, public_key=KEY.public_key())
    digest = kept.version().manifest_sha256
    for signature in (None, signing.sign(digest, OTHER)):
        with pytest.raises(ArtifactError, match="sign"):
            store.fetch(kept.version(signature=signature), accept)
    signed = kept.version(signature=signing.sign(digest, KEY))
    assert store.fetch(signed, accept).downloaded
    # not even what is here already
    with pytest.raises(ArtifactError, match="without a signature"):
        store.fetch(kept.version(), accept)
