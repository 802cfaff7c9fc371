"""The shipped dvc.yaml: DVC resolves it, and it names all that a stage reads, code included."""

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import dag
from tests.pipelines.conftest import Workspace

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")
OURS = ("pipelines", "ptv2_core", "ptv2_serving")
# What every stage uses to read its settings, name its files and report its errors. A change there
# is no reason to train again.
GLUE = (
    "pipelines/checking.py",
    "pipelines/dag.py",
    "pipelines/errors.py",
    "pipelines/paths.py",
    "pipelines/prepared.py",
    "pipelines/settings.py",
    "pipelines/stages/__init__.py",
    "pipelines/tables.py",
    "ptv2_core/__init__.py",
    "ptv2_core/errors.py",
    "ptv2_core/files.py",
)


def shipped() -> dict[str, Any]:
    return {
        name: stage["do"]
        for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
    }


def test_dvc_resolves_the_shipped_graph(fresh: Workspace) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, fresh.root)
    graph = dag.read_graph(fresh.root)
    assert [node.stage for node in graph.nodes.values()] == [s for s in STAGES for _ in range(3)]
    upstream = {node.stage: set(node.upstream) for node in graph.select(["slots"]).nodes.values()}
    assert upstream == {
        "fetch": set(),
        "prepare": {"fetch@slots"},
        "search": {"prepare@slots"},
        "train": {"prepare@slots", "search@slots"},
        "evaluate": {"prepare@slots", "train@slots"},
        "register": {"prepare@slots", "evaluate@slots", "search@slots", "train@slots"},
    }
    assert graph.nodes["train@slots"].command == "ptv2 train --task slots"


def test_stages_are_those_of_the_command_line_and_read_their_own_section() -> None:
    stages = shipped()
    assert tuple(stages) == STAGES
    for name, stage in stages.items():
        assert stage["cmd"] == f"ptv2 {name} --task ${{key}}"
        assert f"pipelines/stages/{name}.py" in stage["deps"]
        own = {f"tasks.${{key}}.{name}"} if name in STAGES[:4] else set()
        shared = {name} if name != "fetch" else set()
        assert own | shared <= set(stage["params"])


def _code_deps(stage: dict[str, Any]) -> list[str]:
    return [dep for dep in stage["deps"] if dep.startswith(OURS)]


def test_code_that_a_stage_depends_on_is_there() -> None:
    for stage in shipped().values():
        for dep in _code_deps(stage):
            assert (ROOT / dep).exists(), dep


@pytest.mark.parametrize("name", STAGES)
def test_code_that_a_stage_imports_is_a_dep(name: str) -> None:
    deps = _code_deps(shipped()[name])
    for file in _imports(ROOT / "pipelines" / "stages" / f"{name}.py"):
        # Another stage's module is imported for reading what that stage wrote, which is a dep.
        is_reader = file.removeprefix("pipelines/stages/").removesuffix(".py") in STAGES
        covered = any(file == dep or file.startswith(f"{dep}/") for dep in deps)
        assert covered or is_reader or file in GLUE, f"{name} imports {file}, not in dvc.yaml"


def _imports(path: Path) -> set[str]:
    """Return our own files that a module imports, relative to the root."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    found = set()
    for name in names:
        if name.split(".")[0] in OURS:
            stem = name.replace(".", "/")
            files = (f"{stem}.py", f"{stem}/__init__.py")
            found |= {file for file in files if (ROOT / file).is_file()}
    return found - {"pipelines/__init__.py"}


def test_everything_written_is_an_out_a_metric_or_a_plot() -> None:
    written = {
        name: [
            next(iter(item)) if isinstance(item, dict) else item
            for kind in ("outs", "metrics", "plots")
            for item in stage.get(kind, [])
        ]
        for name, stage in shipped().items()
    }
    ignored = (ROOT / ".gitignore").read_text()
    for paths in written.values():
        for path in paths:
            top = path.split("/${key}")[0]
            assert f"/{top}/" in ignored, f"{path} would make DVC write a .gitignore"
    reads = {dep for stage in shipped().values() for dep in stage["deps"]}
    assert "prompts/${key}" in written["train"]
    assert {"results/${key}/search/best.json", "results/${key}/train"} <= reads
