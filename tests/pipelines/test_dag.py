import json
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import dag
from pipelines.errors import (
    PipelineError,
    StageFailedError,
    StageInterruptedError,
    StageTemporaryError,
    TemporaryError,
)
from pipelines.settings import child_environment
from tests.pipelines.conftest import Workspace
from tests.pipelines.processes import is_running

ROOT = Path(__file__).resolve().parents[2]


def repro(workspace: Workspace, address: str, **options: object) -> dag.ReproResult:
    return dag.repro(address, workspace.root, child_environment(), **options)  # type: ignore[arg-type]


def test_graph_has_every_stage_after_its_upstream(fresh: Workspace) -> None:
    graph = dag.read_graph(fresh.root)
    assert list(graph.nodes) == ["fetch@a", "fetch@b", "train@a", "train@b"]
    assert graph.nodes["train@b"] == dag.StageNode(
        address="train@b",
        stage="train",
        task="b",
        upstream=("fetch@b",),
        command="python stand_in.py train b",
    )
    assert list(graph.select(["b"]).nodes) == ["fetch@b", "train@b"]
    assert graph.downstream({"fetch@a"}) == {"fetch@a", "train@a"}


def test_graph_does_not_depend_on_the_working_folder(
    fresh: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fresh.root)
    inside = dag.read_graph(Path())
    monkeypatch.chdir("/")
    assert dag.read_graph(fresh.root) == inside


def test_graph_is_read_for_a_user_without_a_name(
    fresh: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # given back at the end, whatever is set meanwhile
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert len(dag.read_graph(fresh.root).nodes) == 4
    # what is started from here asks as well
    assert child_environment()["USER"] == f"uid-{os.getuid()}"


def test_unknown_task_is_refused_with_the_known_ones(fresh: Workspace) -> None:
    with pytest.raises(PipelineError, match=r"expected a task of dvc.yaml \(a, b\), got 'c'"):
        dag.read_graph(fresh.root).select(["c"])


@pytest.mark.parametrize("broken", ["no file", "no repository", "bad yaml", "unknown key"])
def test_a_graph_that_cannot_be_read_is_one_error(
    broken: str, fresh: Workspace, tmp_path: Path
) -> None:
    path = fresh.root / "dvc.yaml"
    root = fresh.root
    if broken == "no file":
        path.unlink()
    elif broken == "no repository":
        root = tmp_path / "bare"
        root.mkdir()
        (root / "dvc.yaml").write_text("stages: {}")
    elif broken == "bad yaml":
        path.write_text("stages: [")
    else:
        path.write_text("stages: {a: {cmd: x, bogus: 1}}")
    with pytest.raises(PipelineError):
        dag.read_graph(root)


@pytest.mark.slow
def test_a_stage_runs_once_then_comes_from_the_cache(fresh: Workspace) -> None:
    lines: list[tuple[str, str]] = []
    first = repro(fresh, "fetch@a", on_line=lambda stream, line: lines.append((stream, line)))
    assert (first.ran, first.cached) == (True, False)
    assert [(stream, line.partition(":")[0]) for stream, line in lines] == [
        ("stdout", "fetch of a")
    ]
    again = repro(fresh, "fetch@a")
    assert (again.ran, again.cached) == (False, False)
    (fresh.root / "out" / "a" / "fetch.json").unlink()
    back = repro(fresh, "fetch@a")
    assert (back.ran, back.cached) == (False, True)
    assert len(fresh.times("fetch@a")) == 2


@pytest.mark.slow
def test_a_failed_stage_says_what_its_command_said_and_keeps_its_outs(done: Workspace) -> None:
    before = done.out("a", "train")
    done.set("a", "train", text="new", fails=9, exit=3)
    with pytest.raises(StageFailedError) as caught:
        repro(done, "train@a")
    assert str(caught.value) == "train@a: error: boom\nsecond line"
    assert caught.value.exit_code == 3
    assert not isinstance(caught.value, TemporaryError)
    assert done.out("a", "train") == before == '["train", ""]'


@pytest.mark.slow
def test_exit_code_75_may_be_tried_again(done: Workspace) -> None:
    done.set("a", "train", fails=9, exit=75)
    with pytest.raises(StageTemporaryError, match="boom"):
        repro(done, "train@a")


@pytest.mark.slow
def test_a_lock_of_a_live_process_may_be_tried_again(done: Workspace) -> None:
    done.set("a", "train", text="new")
    mine = {"pid": os.getpid(), "cmd": " ".join(sys.argv)}
    target = str(done.root / "out" / "a" / "train.json")
    _write_rwlock(done.root, {"write": {target: mine}, "read": {}})
    with pytest.raises(StageTemporaryError, match="another process is in the way"):
        repro(done, "train@a")
    assert done.out("a", "train") == '["train", ""]'


def _write_rwlock(root: Path, entries: object) -> Path:
    path = root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def test_locks_of_dead_processes_are_cleared(done: Workspace) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        alive = {"pid": sleeper.pid, "cmd": f"{sys.executable} -c import time; time.sleep(60)"}
        reused = {"pid": os.getpid(), "cmd": "dvc repro --single-item another@task"}
        dead = {"pid": gone.pid, "cmd": "dvc repro"}
        entries = {"write": {"x": dead, "y": alive}, "read": {"z": [reused, alive], "w": [dead]}}
        path = _write_rwlock(done.root, entries)
        dag.clear_dead_locks(done.root)
        assert json.loads(path.read_text()) == {"write": {"y": alive}, "read": {"z": [alive]}}
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("torn", ["", '{"write": {"x": {"pi', "[]", '{"write": {"x": 3}}'])
def test_a_torn_lock_table_is_removed(torn: str, done: Workspace) -> None:
    path = _write_rwlock(done.root, torn)
    dag.clear_dead_locks(done.root)
    assert not path.exists()


@pytest.mark.slow
def test_an_interrupt_ends_the_command_and_keeps_the_outs(done: Workspace) -> None:
    before = done.out("a", "train")
    done.set("a", "train", sleep=60)
    stop = threading.Event()

    def stop_once_it_runs(stream: str, line: str) -> None:
        stop.set()

    with pytest.raises(StageInterruptedError, match="was interrupted"):
        repro(done, "train@a", on_line=stop_once_it_runs, stop=stop)
    assert done.out("a", "train") == before
    assert not is_running(done.pids("train@a")[0])


@pytest.mark.slow
def test_a_killed_parent_leaves_no_command_behind(done: Workspace) -> None:
    done.set("a", "train", sleep=60)
    code = (
        "from pathlib import Path; from pipelines import dag; "
        "from pipelines.settings import child_environment as e; "
        "dag.repro('train@a', Path('.'), e({'PYTHONUNBUFFERED': '1'}))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=done.root,
        env=child_environment({"PYTHONPATH": str(ROOT)}),
    )
    assert _within(30, lambda: bool(done.times("train@a")))
    pid = done.pids("train@a")[0]
    assert is_running(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _within(15, lambda: not is_running(pid))
    done.set("a", "train", text="later")
    dag.clear_dead_locks(done.root)
    assert repro(done, "train@a").ran


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_only_what_changed_and_what_needs_it_is_stale(done: Workspace) -> None:
    graph = dag.read_graph(done.root)
    assert dag.stale(done.root, graph, child_environment()) == set()
    done.set("a", "fetch", text="new")
    assert dag.stale(done.root, graph, child_environment()) == {"fetch@a", "train@a"}
    only_b = graph.select(["b"])
    assert dag.stale(done.root, only_b, child_environment()) == set()


def test_data_hashes_are_those_of_the_lock_file(done: Workspace) -> None:
    hashes = dag.data_hashes(done.root, "train@a")
    assert sorted(hashes) == ["out/a/fetch.json", "out/a/train.json"]
    assert all(len(md5) == 32 for md5 in hashes.values())
    assert dag.data_hashes(done.root, "train@zzz") == {}
    (done.root / "dvc.lock").unlink()
    assert dag.data_hashes(done.root, "train@a") == {}


def test_the_commit_is_dirty_only_after_a_change_of_ours(done: Workspace, tmp_path: Path) -> None:
    clean = dag.git_commit(done.root)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (done.root / "stand_in.py").write_text("changed")
    assert dag.git_commit(done.root) == {"commit": clean["commit"], "dirty": True}
    outside = tmp_path / "outside"
    outside.mkdir()
    assert dag.git_commit(outside) == {"commit": None, "dirty": False}
