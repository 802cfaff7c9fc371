"""The whole chain as a user runs it: DVC, Prefect, MLflow and the stages as real processes."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import child_environment
from tests.stage_parts import PARAMS, call, change_params, make_workspace, write_params

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")
DVC = (sys.executable, "-m", "dvc")
PATIENCE_S = 240.0

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """Return the environment of a user's shell, without servers of another one."""
    found = child_environment({"OMP_NUM_THREADS": "1"})
    return {
        name: value
        for name, value in found.items()
        if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    }


def run(root: Path, *command: str) -> str:
    """Run a command that must succeed; returns its standard output."""
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


def program() -> str:
    found = shutil.which("ptv2", path=environment()["PATH"])
    assert found is not None, "the project is installed"
    return found


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


# dvc repro


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with two tasks in which every stage has run."""
    tasks = {task: PARAMS["tasks"][task] for task in ("intents", "pairs")}
    root = make_repository(tmp_path_factory.mktemp("chain") / "repeated", tasks)
    assert repro(root, *(f"{stage}@intents" for stage in STAGES)) == sorted(
        f"{stage}@intents" for stage in STAGES
    )
    # the other task's stages in this process: starting six more takes most of a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert [call(stage, "--task", "pairs") for stage in STAGES] == [0] * 6
    run(root, *DVC, "commit", "-q", "--force", *(f"{stage}@pairs" for stage in STAGES))
    return root


@pytest.fixture
def repository(repeated: Path, tmp_path: Path) -> Path:
    """Return a copy of the repository, to be changed."""
    return shutil.copytree(repeated, tmp_path / "repository", symlinks=True)


def test_chain_runs_nothing_when_nothing_changed(repeated: Path) -> None:
    assert status(repeated) == {}
    assert repro(repeated) == []
    assert versions(repeated) == [("intents", 1), ("pairs", 1)]
    assert run(repeated, "git", "status", "--porcelain").splitlines() == ["?? dvc.lock"]


def test_chain_version_leads_back_to_commit_and_data(repeated: Path) -> None:
    made = registered(repeated, "intents")
    with closing(sqlite3.connect(repeated / "mlflow.db")) as connection:
        rows = connection.execute(
            "SELECT key, value FROM model_version_tags WHERE name = 'intents'"
        )
        tags = dict(rows.fetchall())
    assert tags["git_commit"] == run(repeated, "git", "rev-parse", "HEAD").strip()
    assert tags["prompt_sha256"] == made["sha256"]
    manifest = json.loads((repeated / "prompts" / "intents" / "prompt.json").read_text())
    assert manifest["provenance"]["git_commit"] == tags["git_commit"]
    prepared = json.loads((repeated / "data" / "prepared" / "intents" / "task.json").read_text())
    assert manifest["provenance"]["data"] == prepared["digests"]


def test_chain_metrics_and_plots_are_shown_by_dvc(repository: Path) -> None:
    shown = json.loads(run(repository, *DVC, "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert sorted(files) == [
        f"results/{task}/{stage}/metrics.json"
        for task in ("intents", "pairs")
        for stage in ("evaluate", "train")
    ]
    evaluated = files["results/intents/evaluate/metrics.json"]["data"]
    assert evaluated["metric"] == "accuracy"
    assert 0.0 <= evaluated["test"] <= 1.0
    plots = json.loads(run(repository, *DVC, "plots", "show", "--json"))
    assert "errors" not in plots
    shown_plots = {re.sub(r"^.*?(results/)", r"\1", name) for name in plots["data"]}
    assert shown_plots >= {
        f"results/{task}/{file}"
        for task in ("intents", "pairs")
        for file in ("search/trials.csv", "train/history.csv", "evaluate/confusion.csv")
    }


def test_chain_results_go_to_a_remote_and_come_back(repository: Path, tmp_path: Path) -> None:
    run(repository, *DVC, "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
    run(repository, *DVC, "push", "-q")
    assert status(repository, "--cloud") == {}
    prompt = repository / "prompts" / "intents" / "prompt.safetensors"
    before = prompt.read_bytes()
    for folder in ("prompts", "results", "data", ".dvc/cache"):
        shutil.rmtree(repository / folder)
    run(repository, *DVC, "pull", "-q")
    assert prompt.read_bytes() == before
    assert status(repository) == {}


def test_chain_a_change_of_train_runs_what_depends_on_it_alone(repository: Path) -> None:
    before = registered(repository, "intents"), registered(repository, "pairs")
    change_params(repository, {"tasks.intents.train": {"epochs": 3}})
    assert repro(repository) == [
        f"{stage}@intents" for stage in ("evaluate", "register", "search", "train")
    ]
    assert status(repository) == {}
    after = registered(repository, "intents")
    assert (before[0]["version"], after["version"]) == (1, 2)
    assert after["sha256"] != before[0]["sha256"]
    assert registered(repository, "pairs") == before[1]
    assert versions(repository) == [("intents", 1), ("intents", 2), ("pairs", 1)]


def test_chain_a_change_of_prepare_does_not_fetch_again(repository: Path) -> None:
    change_params(repository, {"tasks.intents.prepare.max_length": 16})
    assert sorted(status(repository)) == ["prepare@intents"]
    assert repro(repository, "prepare@intents") == ["prepare@intents"]


def test_chain_keeps_the_last_good_data_when_new_data_is_broken(repository: Path) -> None:
    file = repository / "mine" / "intents" / "train.jsonl"
    file.write_text(file.read_text() + '{"text": \n')
    before = registered(repository, "intents")
    done = subprocess.run(
        [program(), "run", "--task", "intents"],
        cwd=repository, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    expected = "error: fetch@intents: error: mine/intents/train.jsonl:37, column 10: not valid JSON"
    assert done.stderr.startswith(expected)
    assert "5 stages that need them were skipped" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert (repository / "data" / "raw" / "intents" / "train.jsonl").is_file()
    assert registered(repository, "intents") == before


# Real data


@pytest.mark.bench_data
def test_chain_on_real_data_ends_with_registered_versions(
    tmp_path: Path, bench_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {
        "rte": {
            "fetch": {
                "source": "local",
                "path": str(bench_data.resolve() / "rte"),
                "files": {"train": "train.jsonl", "test": "validation.jsonl"},
            },
            "prepare": {
                "kind": "classification",
                "text": "premise",
                "text_pair": "hypothesis",
                "label": "label",
            },
            "search": {},
            "train": {},
        },
        "snips": {
            "fetch": {"source": "local", "path": str(bench_data.resolve() / "snips")},
            "prepare": {"kind": "tagging", "tokens": "tokens", "tags": "tags"},
            "search": {},
            "train": {},
        },
    }
    root = make_repository(
        tmp_path / "real",
        tasks,
        backbone={**PARAMS["backbone"], "name": "all-minilm-l6-v2"},
        prepare={"max_length": 32, "dev_fraction": 0.1, "test_fraction": 0.1, "max_rows": 64},
        train={"prompt": {"length": 8}, "epochs": 1, "batch_size": 32},
    )
    monkeypatch.chdir(root)
    said = run(root, program(), "run")
    assert "12 stages: 12 ran" in said
    assert "INFO mlflow" not in said
    assert versions(root) == [("rte", 1), ("snips", 1)]
    kinds = {"rte": "accuracy", "snips": "span_f1"}
    for task, metric in kinds.items():
        scores = json.loads((root / "results" / task / "evaluate" / "metrics.json").read_text())
        assert (scores["metric"], scores["test_rows"]) == (metric, 64)
        manifest = json.loads((root / "prompts" / task / "prompt.json").read_text())
        assert len(manifest["golden"]) == 4
        assert call("pull", task, "--to", f"pulled/{task}") == 0
    assert status(root) == {}


# A run that is killed


def _trials(root: Path) -> list[tuple[int, str, str]]:
    """Return number, state and end of each trial of the search, in any state."""
    file = root / ".ptv2" / "studies" / "intents.db"
    if not file.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return connection.execute(
                "SELECT number, state, datetime_complete FROM trials ORDER BY number"
            ).fetchall()
    except sqlite3.OperationalError:
        return []


def _complete(root: Path) -> list[tuple[int, str, str]]:
    return [trial for trial in _trials(root) if trial[1] == "COMPLETE"]


def _processes(root: Path) -> dict[int, str]:
    """Return the processes that run in a folder or below, with their commands."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(root):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:
                    found[int(entry.name)] = command
        except OSError:
            continue
    return found


def _is_training(root: Path) -> bool:
    """Tell whether a train stage has loaded its libraries and goes on."""
    for pid, command in _processes(root).items():
        if "bin/ptv2 train --task intents" in command:
            try:
                return "/safetensors/" in Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                return False
    return False


def _within_patience(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None and process.returncode != -signal.SIGKILL:
            return False
        time.sleep(0.05)
    return False


def _kill_once(root: Path, condition: Callable[[], bool]) -> None:
    """Start `ptv2 run`, kill it as the kernel does once something holds, and see all end."""
    with (root / "killed.log").open("wb") as log:
        process = subprocess.Popen(
            [program(), "run"], cwd=root, env=environment(), stdout=log, stderr=log
        )
    try:
        reached = _within_patience(condition, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert reached, (root / "killed.log").read_text()
    assert _within_patience(lambda: not _processes(root), process), _processes(root)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at processes in /proc")
def test_chain_goes_on_after_sigkill_in_search_and_in_training(tmp_path: Path) -> None:
    root = make_repository(
        tmp_path / "killed",
        {"intents": PARAMS["tasks"]["intents"]},
        search={**PARAMS["search"], "n_trials": 4, "epochs": 30, "pruner": "none"},
        train={"prompt": {"length": 4}, "epochs": 300, "batch_size": 16, "patience": 300},
    )
    _kill_once(root, lambda: len(_complete(root)) >= 2 and _trials(root)[-1][1] == "RUNNING")
    kept = _complete(root)
    assert 2 <= len(kept) < 4
    assert not (root / "results" / "intents" / "search" / "best.json").exists()

    _kill_once(root, lambda: _is_training(root))
    searched = _complete(root)
    assert searched[: len(kept)] == kept
    assert len(searched) == 4
    best = json.loads((root / "results" / "intents" / "search" / "best.json").read_text())
    assert best["n_trials"] == {"complete": 4, "pruned": 0, "failed": 0}
    assert not (root / "results" / "intents" / "train").exists()

    said = run(root, program(), "run")
    assert "6 stages: 3 unchanged, 3 ran" in said
    assert _complete(root) == searched
    assert versions(root) == [("intents", 1)]
    assert status(root) == {}
    assert not _processes(root)
