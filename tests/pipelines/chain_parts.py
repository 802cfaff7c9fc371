"""A Git and DVC repository with the project's own stage graph, for the tests of the whole chain."""

import json
import re
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.pipelines.processes import run
from tests.stage_parts import PARAMS, make_workspace, write_params

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")
DVC = (sys.executable, "-m", "dvc")


def make_repository(root: Path, tasks: dict[str, Any], **shared: Any) -> Path:
    """Make a Git and DVC repository with the project's own stage graph."""
    make_workspace(root)
    write_params(root, {**PARAMS, **shared, "tasks": tasks})
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    for name in ("pipelines", "ptv2_core"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(root, "git", "init", "-q", ".")
    run(root, *DVC, "init", "-q")
    run(root, "git", "add", "-A")
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    run(root, "git", *identity, "commit", "-q", "-m", "start")
    return root


def repro(root: Path, *arguments: str) -> list[str]:
    """Run `dvc repro`; returns the stages whose commands ran, sorted."""
    return sorted(
        re.findall(r"^Running stage '(.+)':$", run(root, *DVC, "repro", *arguments), re.M)
    )


def status(root: Path, *arguments: str) -> dict[str, Any]:
    """Return what `dvc status` says has changed."""
    found: dict[str, Any] = json.loads(run(root, *DVC, "status", "--json", *arguments))
    return found


def registered(root: Path, task: str) -> Any:
    return json.loads((root / "results" / task / "registered.json").read_text())


def versions(root: Path) -> list[tuple[str, int]]:
    """Return all model versions in the registry's database."""
    with closing(sqlite3.connect(root / "mlflow.db")) as connection:
        rows = connection.execute("SELECT name, version FROM model_versions ORDER BY name, version")
        return [(name, version) for name, version in rows]
