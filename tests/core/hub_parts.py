"""Tiny repositories in the shapes that published ones have, on disk and in a hub's cache."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def changed(file: Path, **values: Any) -> None:
    """Change some values of a JSON file; None takes one out."""
    stored = json.loads(file.read_text()) if file.is_file() else {}
    stored = {name: value for name, value in (stored | values).items() if value is not None}
    file.write_text(json.dumps(stored))


def in_shards(whole: Path, folder: Path) -> Path:
    """Save a backbone's weights in several files; returns the folder."""
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(whole).save_pretrained(folder, max_shard_size="20KB")
    return folder


def renamed(folder: Path, prefix: str, **extra: Any) -> Path:
    """Put a prefix before all names of a backbone's tensors, and add tensors."""
    file = folder / "model.safetensors"
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | extra, file, {"format": "pt"})
    return folder


def cached(home: Path, folder: Path, *, commit: str = COMMIT, branch: str | None = None) -> Path:
    """Put a repository into a hub's cache as `org/model`; returns the snapshot."""
    repository = home / "models--org--model"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    if branch:
        (repository / "refs").mkdir()
        (repository / "refs" / branch).write_text(commit)
    return snapshot
