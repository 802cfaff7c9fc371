"""The whole chain, killed as the kernel does it, in a search and in a training."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.pipelines.chain_parts import make_repository, status, versions
from tests.pipelines.processes import Running, environment, has_mapped, processes, program, run
from tests.stage_parts import PARAMS

pytestmark = pytest.mark.slow


def trials(root: Path) -> list[tuple[int, str, str]]:
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


def complete(root: Path) -> list[tuple[int, str, str]]:
    return [trial for trial in trials(root) if trial[1] == "COMPLETE"]


def is_training(root: Path) -> bool:
    """Tell whether a train stage has loaded its libraries and goes on."""
    return any(
        "bin/ptv2 train --task intents" in command and has_mapped(pid, "/safetensors/")
        for pid, command in processes(root).items()
    )


def kill_once(root: Path, condition: Callable[[], object]) -> None:
    """Start `ptv2 run`, kill it as the kernel does once something holds, and see all end."""
    running = Running(root, program(), "run", environment=environment(OMP_NUM_THREADS="2"))
    running.wait_until(condition)
    running.kill()
    running.wait_until_all_is_gone()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at processes in /proc")
def test_chain_goes_on_after_sigkill_in_search_and_in_training(tmp_path: Path) -> None:
    root = make_repository(
        tmp_path / "killed",
        {"intents": PARAMS["tasks"]["intents"]},
        search={**PARAMS["search"], "n_trials": 4, "epochs": 40, "pruner": "none"},
        train={"prompt": {"length": 4}, "epochs": 120, "batch_size": 16, "patience": 120},
    )
    kill_once(root, lambda: len(complete(root)) >= 2 and trials(root)[-1][1] == "RUNNING")
    kept = complete(root)
    assert 2 <= len(kept) < 4
    assert not (root / "results" / "intents" / "search" / "best.json").exists()

    kill_once(root, lambda: is_training(root))
    searched = complete(root)
    assert searched[: len(kept)] == kept
    assert len(searched) == 4
    best = json.loads((root / "results" / "intents" / "search" / "best.json").read_text())
    assert best["n_trials"] == {"complete": 4, "pruned": 0, "failed": 0}
    assert not (root / "results" / "intents" / "train").exists()

    said = run(root, program(), "run")
    assert "6 stages: 3 unchanged, 3 ran" in said
    assert complete(root) == searched
    assert versions(root) == [("intents", 1)]
    assert status(root) == {}
    assert not processes(root)
