"""A small real workspace (git and DVC) whose stages are stand-ins that do as params.yaml says."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipelines.settings import child_environment

if TYPE_CHECKING:
    from tests.pipelines.fault_parts import Nursery
    from tests.pipelines.postgres import Postgres

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

stage, task = sys.argv[1:]
does = json.loads(Path("params.yaml").read_text())["tasks"][task].get(stage, {})
log = Path(".ptv2", f"{stage}@{task}.log")
log.parent.mkdir(exist_ok=True)
tries = log.read_text().count("start") if log.exists() else 0
with log.open("a") as stream:
    stream.write(f"start {time.time()} {os.getpid()}\\n")
print(f"{stage} of {task}: threads {os.environ.get('OMP_NUM_THREADS')}")
out = Path("out", task, f"{stage}.json")
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text("half")
time.sleep(does.get("sleep", 0))
if tries < does.get("fails", 0):
    print("error: boom\\nsecond line", file=sys.stderr)
    sys.exit(does.get("exit", 2))
out.write_text(json.dumps([stage, does.get("text", "")]))
with log.open("a") as stream:
    stream.write(f"end {time.time()}\\n")
"""
DVC_YAML: dict[str, Any] = {
    "stages": {
        "fetch": {
            "foreach": "${tasks}",
            "do": {
                "cmd": "python stand_in.py fetch ${key}",
                "params": ["tasks.${key}.fetch"],
                "outs": ["out/${key}/fetch.json"],
            },
        },
        "train": {
            "foreach": "${tasks}",
            "do": {
                "cmd": "python stand_in.py train ${key}",
                "deps": ["out/${key}/fetch.json"],
                "params": ["tasks.${key}.train"],
                "outs": ["out/${key}/train.json"],
            },
        },
    }
}


class Workspace:
    """A workspace to be changed by one test."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def set(self, task: str, stage: str, **does: Any) -> None:
        """Say what a stage does: text, sleep, fails (its first times), exit."""
        params = self.params()
        params["tasks"][task][stage] = does
        (self.root / "params.yaml").write_text(json.dumps(params))

    def params(self) -> Any:
        return json.loads((self.root / "params.yaml").read_text())

    def out(self, task: str, stage: str) -> str | None:
        path = self.root / "out" / task / f"{stage}.json"
        return path.read_text() if path.exists() else None

    def times(self, address: str) -> list[tuple[str, float]]:
        """Return when a stage's command started and ended."""
        path = self.root / ".ptv2" / f"{address}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line.split()[0], float(line.split()[1])) for line in lines]

    def pids(self, address: str) -> list[int]:
        lines = (self.root / ".ptv2" / f"{address}.log").read_text().splitlines()
        return [int(line.split()[2]) for line in lines if line.startswith("start")]


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, env=child_environment())


@pytest.fixture(scope="session")
def _fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fresh")
    dvc = (sys.executable, "-m", "dvc")
    (root / "stand_in.py").write_text(STAND_IN)
    (root / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
    empty: dict[str, Any] = {"fetch": {}, "train": {}}
    (root / "params.yaml").write_text(json.dumps({"tasks": {"a": empty, "b": empty}}))
    (root / ".gitignore").write_text("/out\n/.ptv2\n")
    _run("git", "init", "-q", ".", cwd=root)
    _run(*dvc, "init", "-q", cwd=root)
    _run("git", "add", "-A", cwd=root)
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    _run("git", *identity, "commit", "-q", "-m", "start", cwd=root)
    return root


@pytest.fixture(scope="session")
def _done(_fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("done") / "workspace"
    shutil.copytree(_fresh, root)
    _run(sys.executable, "-m", "dvc", "repro", "-q", cwd=root)
    shutil.rmtree(root / ".ptv2")
    return root


@pytest.fixture
def fresh(_fresh: Path, tmp_path: Path) -> Workspace:
    """Return a workspace in which nothing has run."""
    shutil.copytree(_fresh, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def done(_done: Path, tmp_path: Path) -> Workspace:
    """Return a workspace in which every stage has run."""
    shutil.copytree(_done, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the API URL of one Prefect server for all tests."""
    from pipelines.prefect_server import temporary_server

    with temporary_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="session")
def sweepable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose task `intents` is prepared and may be swept; to be copied."""
    from tests.pipelines.sweep_engine import sweep_workspace
    from tests.registry_parts import empty_registry

    root = sweep_workspace(tmp_path_factory.mktemp("sweepable") / "space")
    (root / "mlflow.db").write_bytes(empty_registry())
    return root


@pytest.fixture(scope="session")
def warm(sweepable: Path) -> Iterator["Nursery"]:
    """Return a process that has imported what sweeps need, and forks them."""
    from tests.pipelines.fault_parts import nursery

    with nursery(sweepable, sweepable.with_name("nursery.log")) as made:
        yield made


@pytest.fixture(scope="module")
def warm_hosts(warm: "Nursery") -> Iterator[None]:
    """Have the hosts of a module's sweeps forked from a warm process."""
    with warm.hatching():
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator["Postgres"]:
    """Return a real PostgreSQL server on the loopback."""
    pytest.importorskip("psycopg2", reason="needs `pip install 'ptv2[postgres]'`")
    from tests.pipelines.postgres import is_possible, server

    if not is_possible():
        pytest.skip("needs PostgreSQL's initdb, and a user postgres where the tests run as root")
    with server() as found:
        yield found
