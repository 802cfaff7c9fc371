"""`dvc repro` as a user runs it: what runs again after what change, and what comes back."""

import json
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.pipelines.chain_parts import (
    DVC,
    STAGES,
    make_repository,
    registered,
    repro,
    status,
    versions,
)
from tests.pipelines.processes import environment, program, run
from tests.stage_parts import PARAMS, call, change_params

pytestmark = pytest.mark.slow


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
