"""Sources that change, with real DVC and Prefect: what is run, and what is not run again."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines import watching
from pipelines.watch_flow import ptv2_watch
from tests.pipelines.chain_parts import DVC, make_repository
from tests.pipelines.conftest import Workspace
from tests.pipelines.processes import Running, environment, processes, program, run
from tests.stage_parts import PARAMS

pytestmark = pytest.mark.slow


@pytest.fixture
def _server(prefect_url: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


def watch(workspace: Workspace) -> State[Any]:
    state: State[Any] = ptv2_watch(str(workspace.root), return_state=True)
    return state


@pytest.mark.usefixtures("_server")
def test_watch_runs_the_task_whose_source_changed_and_no_other(done: Workspace) -> None:
    nothing = watch(done)
    assert nothing.is_completed()
    assert nothing.message == "nothing changed"
    done.set("b", "train", text="no source of a task")
    assert watch(done).message == "nothing changed"
    assert done.times("train@b") == []

    done.set("a", "fetch", text="new")
    assert watch(done).is_completed()
    assert done.out("a", "fetch") == '["fetch", "new"]'
    assert [kind for kind, _ in done.times("train@a")] == ["start", "end"]
    assert done.times("fetch@b") == done.times("train@b") == []
    assert watch(done).message == "nothing changed"


@pytest.mark.usefixtures("_server")
def test_watch_runs_a_task_whose_fetched_records_are_gone(done: Workspace) -> None:
    (done.root / "out" / "b" / "fetch.json").unlink()
    looked = watch(done)
    assert looked.is_completed()
    assert done.out("b", "fetch") == '["fetch", ""]'


@pytest.mark.usefixtures("_server")
def test_watch_does_not_run_the_same_broken_source_again_and_again(done: Workspace) -> None:
    done.set("a", "fetch", fails=1000)
    assert watch(done).is_failed()
    again = watch(done)
    assert again.is_completed()
    assert again.message == "nothing changed; given to a run before: a"
    assert len(done.times("fetch@a")) == 1
    done.set("a", "fetch", text="mended")
    assert watch(done).is_completed()
    assert done.out("a", "fetch") == '["fetch", "mended"]'


def test_watch_tries_the_same_source_again_after_a_while(done: Workspace) -> None:
    done.set("a", "fetch", text="new")
    found = watching.look(done.root, now=lambda: 1000.0)
    assert (list(found.changed), found.due, found.tried) == (["a"], ("a",), ())
    watching.note(done.root, found, found.due, now=lambda: 1000.0)
    soon = watching.look(done.root, now=lambda: 1000.0 + watching.RETRY_AFTER_S - 1)
    assert (soon.due, soon.tried) == ((), ("a",))
    late = watching.look(done.root, now=lambda: 1000.0 + watching.RETRY_AFTER_S)
    assert late.due == ("a",)
    set_back = watching.look(done.root, now=lambda: 10.0)
    assert set_back.due == ("a",)
    (done.root / ".ptv2" / "watch.json").write_text("{half")
    assert watching.look(done.root).due == ("a",)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with the project's own stage graph and one fetched task."""
    tasks = {"intents": PARAMS["tasks"]["intents"]}
    root = make_repository(tmp_path_factory.mktemp("watch") / "repository", tasks)
    run(root, *DVC, "repro", "-q", "fetch@intents")
    return root


def watch_once(root: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program(), "watch", "--once"],
        cwd=root, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_watch_command_starts_no_server_when_nothing_changed(repository: Path) -> None:
    done = watch_once(repository)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing changed\n", "")
    assert not (repository / ".ptv2" / "prefect").exists()


def test_watch_command_ends_with_ctrl_c(repository: Path) -> None:
    running = Running(repository, program(), "watch", "--every", "3600", environment=environment())
    try:
        running.wait_until(lambda: "next look in 3600 s" in running.said)
        assert running.interrupt() == 0
    finally:
        with suppress(ProcessLookupError):
            running.kill_all()
    assert running.said.startswith("nothing changed\nnext look in 3600 s; Ctrl-C ends\n")
    assert running.said.endswith("ended; the same command goes on from what is finished\n")
    assert processes(repository) == {}


def test_watch_command_tells_what_a_changed_source_came_to(repository: Path) -> None:
    file = repository / "mine" / "intents" / "train.jsonl"
    file.write_text(file.read_text() + '{"text": \n')
    failed = watch_once(repository)
    assert failed.returncode == 2
    assert failed.stdout.startswith("changed: intents\n")
    assert "mine/intents/train.jsonl:37, column 10: not valid JSON" in failed.stderr
    again = watch_once(repository)
    assert again.returncode == 0
    assert again.stdout == (
        "intents: not run again with the same sources within 60 minutes\nnothing else changed\n"
    )
