"""A workspace with a tiny backbone and three small local tasks, for the tests of whole stages."""

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import cli
from ptv2_core.data.examples import TextExample
from tests.tiny import examples_of, tiny_backbone

TASKS = ("intents", "pairs", "slots")

PARAMS: dict[str, Any] = {
    "backbone": {
        "name": "./backbone",
        "revision": None,
        "digest": None,
        "precision": "fp32",
        "device": "cpu",
    },
    "prepare": {"max_length": 32, "dev_fraction": 0.2, "test_fraction": 0.2},
    "search": {
        "n_trials": 2,
        "epochs": 1,
        "grace_epochs": 1,
        "space": {"prompt_length": [2, 4], "learning_rate": [1e-3, 3e-2]},
    },
    # a random backbone's own keys and values are small, and its few rows few steps
    "train": {
        "prompt": {"length": 4, "start": "normal", "start_attention": None},
        "learning_rate": 1e-2,
        "head_learning_rate": None,
        "epochs": 2,
        "batch_size": 16,
    },
    "evaluate": {"probe": True},
    "register": {"tracking_uri": "sqlite:///mlflow.db", "experiment": "ptv2", "gate_margin": 0.0},
    "run": {"concurrency": 2, "retries": 0},
    "tasks": {
        "intents": {
            "fetch": {"source": "local", "path": "mine/intents"},
            "prepare": {"kind": "classification", "text": "text", "label": "label"},
            "search": {},
            "train": {},
        },
        "pairs": {
            "fetch": {"source": "local", "path": "mine/pairs"},
            "prepare": {
                "kind": "classification",
                "text": "first",
                "text_pair": "second",
                "label": "same",
            },
            "search": {},
            "train": {},
        },
        "slots": {
            "fetch": {"source": "local", "path": "mine/slots"},
            "prepare": {"kind": "tagging", "tokens": "tokens", "tags": "tags"},
            "search": {"n_trials": 0},
            # enough to tag a name by itself
            "train": {"learning_rate": 3e-2, "epochs": 20, "patience": 20},
        },
    },
}


def make_workspace(root: Path) -> Path:
    """Write params.yaml, a tiny backbone and the data of three tasks; returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    tiny_backbone(root / "backbone")
    write_params(root, PARAMS)
    for seed, split in enumerate(("train", "dev", "test")):
        rows = {"train": 36, "dev": 12, "test": 12}[split]
        write_jsonl(root / "mine" / "intents" / f"{split}.jsonl", intent_rows(rows, seed=seed))
    _write_pairs(root / "mine" / "pairs" / "train.csv", rows=40)
    for seed, split in enumerate(("train", "valid", "test")):
        _write_columns(root / "mine" / "slots" / f"{split}.conll", rows=40, seed=seed)
    return root


def intent_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Return records of three classes whose label is a word of the text."""
    found = examples_of("classification", count, seed=seed)
    return [{"text": e.text, "label": str(e.label)} for e in found if isinstance(e, TextExample)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_pairs(path: Path, *, rows: int) -> None:
    chooser = random.Random(0)
    lines = ["first,second,same"]
    for _ in range(rows):
        first, second = (chooser.choice(("rome", "paris")) for _ in range(2))
        lines.append(f"find {first},show {second},{'yes' if first == second else 'no'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_columns(path: Path, *, rows: int, seed: int) -> None:
    chooser = random.Random(seed)
    sentences = []
    for _ in range(rows):
        verb, person = chooser.choice(("call", "find", "tell")), chooser.choice(("anna", "bob"))
        city = chooser.choice(("rome", "paris", "oslo"))
        sentences.append(f"please O\n{verb} O\n{person} B-person\nin O\n{city} B-city\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sentences), encoding="utf-8")


def write_params(root: Path, params: dict[str, Any]) -> None:
    """Write params.yaml."""
    text = yaml.safe_dump(params, sort_keys=False)
    (root / "params.yaml").write_text(text, encoding="utf-8")


def read_params(root: Path) -> dict[str, Any]:
    """Read params.yaml."""
    params: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    return params


def change_params(root: Path, changes: dict[str, Any]) -> None:
    """Set values of params.yaml by their dotted paths."""
    params = read_params(root)
    for path, value in changes.items():
        *above, last = path.split(".")
        target = params
        for step in above:
            target = target.setdefault(step, {})
        target[last] = value
    write_params(root, params)


def tree(root: Path) -> dict[str, str]:
    """Return every file and folder under `root` with the digest of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(root.rglob("*"))
    }


def files(folder: Path) -> list[str]:
    """Return the names of all files under a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def call(*arguments: str) -> int:
    """Run the command line in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ptv2", *arguments])
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)
