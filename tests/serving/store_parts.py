"""Prompts on disk as a registry keeps them, without a registry."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptv2_serving.objects import Objects
from ptv2_serving.routing import ResolvedVersion

TASK = "tiny"
FILES = ("prompt.json", "prompt.safetensors")


class Kept:
    """The files of one version, to be harmed, and the registry's word for them."""

    def __init__(self, root: Path, artifact: Path) -> None:
        self.root = root / "kept"
        self.folder = self.root / "artifacts" / "prompt"
        shutil.copytree(artifact, self.folder)
        self.manifest = self.folder / "prompt.json"
        self.weights = self.folder / "prompt.safetensors"

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change prompt.json; its sha256 of the weights is made right afterwards."""
        values = json.loads(self.manifest.read_text())
        values["sha256"] = sha256(self.weights)
        change(values)
        self.manifest.write_text(json.dumps(values))

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the header of the weights, and nothing behind it."""
        data = self.weights.read_bytes()
        length = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        self.edit(lambda manifest: None)

    def version(self, number: int = 1, **changes: Any) -> ResolvedVersion:
        """Return a version whose digests are those of the files, whatever they hold."""
        stated = {
            "task": TASK,
            "version": number,
            "prompt_sha256": sha256(self.weights),
            "manifest_sha256": sha256(self.manifest),
            "source": self.root.as_uri(),
        }
        return ResolvedVersion(**(stated | changes))


def sha256(file: Path) -> str:
    """Return the sha256 of a file, of nothing where there is none."""
    data = file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(data).hexdigest()


def open_store(root: Path, **how: Any) -> Objects:
    """Open a store whose registry is not there; versions say where their files are."""
    how = {"tracking_uri": "sqlite:///mlflow.db"} | how
    return Objects(root / "store", root=root, **how)


def tree(folder: Path) -> dict[str, str]:
    """Return every file under a folder with its sha256."""
    return {
        str(file.relative_to(folder)): sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def accept(folder: Path, manifest: Any) -> None:
    """Verify nothing."""
