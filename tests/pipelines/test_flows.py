import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines import flows, prefect_session
from pipelines.errors import PipelineError
from tests.pipelines.conftest import Workspace
from tests.pipelines.processes import is_running

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "RETRY_DELAYS_S", (0.1, 0.1))


@pytest.fixture
def _server(prefect_url: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


def run(
    workspace: Workspace, *tasks: str, retries: int = 0, concurrency: int = 2, **options: Any
) -> flows.RunSummary:
    chosen = list(tasks) or ["a", "b"]
    return flows.run(workspace.root, chosen, concurrency=concurrency, retries=retries, **options)


def states(summary: flows.RunSummary) -> dict[str, str]:
    return {outcome.address: outcome.state for outcome in summary.stages}


def _task_runs(flow_run_id: str, count: int) -> dict[str, Any]:
    """Return a flow run's finished task runs, once the server has worked through their events."""
    only_this = FlowRunFilter.model_validate({"id": {"any_": [UUID(flow_run_id)]}})
    deadline = time.monotonic() + 20
    while True:
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(
                flow_run_filter=only_this, sort=TaskRunSort.NAME_ASC, limit=100
            )
        final = {run.name: run for run in found if run.state is not None and run.state.is_final()}
        if len(final) >= count or time.monotonic() > deadline:
            return final
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
def test_independent_stages_run_side_by_side_and_a_second_run_runs_nothing(
    fresh: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh.set("a", "fetch", sleep=3)
    fresh.set("b", "fetch", sleep=3)
    events: list[flows.StageEvent] = []
    summary = run(fresh, on_event=events.append)
    assert set(states(summary).values()) == {"ran"}
    assert list(states(summary)) == ["fetch@a", "fetch@b", "train@a", "train@b"]
    (_, start_a), (_, end_a) = fresh.times("fetch@a")
    (_, start_b), (_, end_b) = fresh.times("fetch@b")
    assert max(start_a, start_b) < min(end_a, end_b)
    assert fresh.times("train@a")[0][1] > end_a
    lines = [event.text for event in events if event.kind == "line"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"fetch of a: threads {os.environ.get('OMP_NUM_THREADS', threads)}" in lines
    assert capfd.readouterr() == ("", "")

    assert summary.flow_run_id is not None
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(summary.flow_run_id))
        assert flow_run.name == summary.name
        assert flow_run.state is not None
        assert flow_run.state.is_completed()

    again = run(fresh)
    assert set(states(again).values()) == {"unchanged"}
    assert len(fresh.times("fetch@a")) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
def test_a_failed_stage_takes_down_only_those_that_need_it(
    done: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    done.set("a", "fetch", text="new", fails=9)
    done.set("b", "fetch", text="new")
    summary = run(done, retries=2)
    assert states(summary) == {
        "fetch@a": "failed",
        "train@a": "skipped",
        "fetch@b": "ran",
        "train@b": "ran",
    }
    (failed,) = summary.failed
    assert failed.message == "fetch@a: error: boom\nsecond line"
    skipped = next(o for o in summary.stages if o.state == "skipped")
    assert skipped.message == "train@a: skipped, since fetch@a did not end well"
    assert len(done.times("fetch@a")) == 1, "a stage that is wrong is not tried again"
    assert capfd.readouterr() == ("", ""), "no traceback on the console"
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(str(summary.flow_run_id)))
    assert flow_run.state is not None
    assert flow_run.state.is_failed()
    assert "1 failed" in str(flow_run.state.message)
    assert "error: boom" in str(flow_run.state.message)


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
def test_a_temporary_failure_is_tried_again(done: Workspace) -> None:
    done.set("a", "train", text="new", fails=1, exit=75)
    summary = run(done, "a", retries=2)
    assert states(summary) == {"fetch@a": "unchanged", "train@a": "ran"}
    assert [kind for kind, _ in done.times("train@a")] == ["start", "start", "end"]
    assert summary.flow_run_id is not None
    known = _task_runs(summary.flow_run_id, 2)
    assert set(known) == {"fetch@a", "train@a"}
    assert {"a", "train"} <= set(known["train@a"].tags)
    assert known["train@a"].run_count == 2
    assert known["fetch@a"].state.name == "Unchanged"


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGINT, "CANCELLED"), (signal.SIGTERM, "CRASHED")]
)
def test_a_signal_ends_the_stages_and_puts_their_outs_back(
    number: signal.Signals, state: str, done: Workspace
) -> None:
    before = done.out("a", "train")
    done.set("a", "train", sleep=60)

    def on_event(event: flows.StageEvent) -> None:
        if event.kind == "line" and event.text.startswith("train of a"):
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

    with pytest.raises(KeyboardInterrupt):
        run(done, "a", on_event=on_event)
    assert not is_running(done.pids("train@a")[0])
    assert done.out("a", "train") == before
    with get_client(sync_client=True) as client:
        (last, *_) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert last.state_type == state


@pytest.mark.slow
def test_without_a_server_and_without_work_none_is_started(
    done: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refuse(root: Path) -> Iterator[str]:
        raise AssertionError("a server was started")
        yield ""

    monkeypatch.setattr(prefect_session, "temporary_server", refuse)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        summary = run(done)
    assert summary.flow_run_id is None
    assert set(states(summary).values()) == {"unchanged"}


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_error(done: Workspace) -> None:
    done.set("a", "train", text="new")
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(PipelineError, match="cannot reach Prefect at http://127.0.0.1:9/api"),
    ):
        run(done, "a")
