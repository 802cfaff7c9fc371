"""A search as a user runs it, in two processes that are killed or interrupted."""

import csv
import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipelines.paths import TaskPaths
from pipelines.threads import available_cores
from tests.pipelines.processes import Running, environment, has_mapped, processes, program
from tests.stage_parts import call, change_params, intent_rows, make_workspace, write_jsonl

# enough that a test which looks too seldom, on a busy machine, still meets an unfinished search
N_TRIALS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at processes in /proc"),
    pytest.mark.skipif(available_cores() < 2, reason="a search has a process for each core"),
]


def paths_of(root: Path) -> TaskPaths:
    return TaskPaths(root=root, task="intents")


def make_ready(root: Path, changes: dict[str, Any], *, rows: int) -> Path:
    """Make a workspace in which `intents` is prepared."""
    make_workspace(root)
    write_jsonl(root / "mine" / "intents" / "train.jsonl", intent_rows(rows, seed=0))
    change_params(root, {"search.n_trials": N_TRIALS, "search.parallel": 2, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert [call(stage, "-t", "intents") for stage in ("fetch", "prepare")] == [0, 0]
    return root


@pytest.fixture(scope="module")
def short_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose trials take a second."""
    root = tmp_path_factory.mktemp("search") / "short"
    return make_ready(root, {"search.epochs": 30, "search.pruner": "none"}, rows=36)


@pytest.fixture(scope="module")
def long_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace in which an epoch takes a minute."""
    root = tmp_path_factory.mktemp("search") / "long"
    return make_ready(root, {"train.batch_size": 1}, rows=20_000)


def start_search(root: Path) -> Running:
    """Start a search whose trials train in two processes."""
    return Running(
        root, program(), "search", "-t", "intents", environment=environment(OMP_NUM_THREADS="2")
    )


def workers(root: Path) -> list[int]:
    """Return the processes in which trials train."""
    return [pid for pid, command in processes(root).items() if "spawn_main" in command]


def importing(root: Path) -> list[int]:
    """Return those of them that have begun to import what they need."""
    return [pid for pid in workers(root) if has_mapped(pid, "/libtorch_cpu")]


def in_training(root: Path) -> list[int]:
    """Return those of them that have come to their trials."""
    return [pid for pid in workers(root) if has_mapped(pid, "/data/prepared/intents/")]


def states(root: Path) -> list[str]:
    """Return the state of each trial, in the order they began."""
    file = paths_of(root).study
    if not file.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT state FROM trials ORDER BY number").fetchall()
    except sqlite3.OperationalError:
        return []
    return [state for (state,) in rows]


def complete(root: Path) -> int:
    """Return how many trials are complete."""
    return states(root).count("COMPLETE")


def test_search_stage_interrupted_and_killed_ends_with_exactly_its_trials(
    short_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(short_epochs, tmp_path / "workspace")
    interrupted = start_search(root)
    interrupted.wait_until(lambda: complete(root) >= 1)
    assert len(workers(root)) == 2
    assert interrupted.interrupt() == 130
    interrupted.wait_until_all_is_gone()
    *progress, last = interrupted.said.splitlines()
    assert last == "interrupted; the same command goes on from what is finished"
    assert [line for line in progress if not line.startswith("search intents: ")] == []

    given_up = states(root).count("RUNNING")
    kept = complete(root)

    killed = start_search(root)
    killed.wait_until(lambda: complete(root) > kept)
    killed.kill()
    killed.wait_until_all_is_gone()
    assert all(line.startswith("search intents: ") for line in killed.said.splitlines())
    given_up += states(root).count("RUNNING")
    assert kept < complete(root) < N_TRIALS

    monkeypatch.chdir(root)
    assert call("search", "-t", "intents") == 0
    best = json.loads((paths_of(root).search / "best.json").read_text())
    assert best["n_trials"] == {"complete": N_TRIALS, "pruned": 0, "failed": 0}
    assert sorted(states(root)) == ["COMPLETE"] * N_TRIALS + ["FAIL"] * given_up
    with (paths_of(root).search / "trials.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == N_TRIALS
    assert len({(row["learning_rate"], row["prompt_length"]) for row in rows}) == N_TRIALS
    best_row = max(rows, key=lambda row: float(row["value"]))
    assert (best["value"], best["trial"]) == (float(best_row["value"]), int(best_row["trial"]))


def test_search_stage_killed_in_an_epoch_leaves_no_process(
    long_epochs: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(long_epochs, tmp_path / "workspace")
    search = start_search(root)
    search.wait_until(lambda: len(in_training(root)) == 2)
    search.kill()
    search.wait_until_all_is_gone(patience_s=20.0)
    assert search.said == ""
    assert states(root) == ["RUNNING", "RUNNING"]


def test_search_stage_interrupted_at_its_start_says_one_line(
    long_epochs: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(long_epochs, tmp_path / "workspace")
    search = start_search(root)
    search.wait_until(lambda: len(importing(root)) == 2)
    begun = workers(root)
    # a shell interrupts the whole group, and nobody says whom first
    for pid in begun:
        os.kill(pid, signal.SIGINT)
    search.wait_until(lambda: len(in_training(root)) == 2)
    assert in_training(root) == begun
    assert search.interrupt() == 130
    search.wait_until_all_is_gone(patience_s=20.0)
    assert search.said == "interrupted; the same command goes on from what is finished\n"
