"""Threads are decided in one place, and every command that multiplies keeps to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import threads
from pipelines.settings import child_environment
from ptv2_core.errors import ConfigError, PTv2Error
from tests.stage_parts import PARAMS, call, write_params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend to have eight cores and no choice of the user's; torch's own is put back."""
    monkeypatch.setattr(threads.joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_threads_available_cores_are_those_of_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from pipelines.threads import available_cores; print(available_cores())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(("workers", "share"), [(0, 8), (1, 8), (2, 4), (3, 2), (8, 1), (9, 1)])
def test_threads_of_all_workers_fit_the_cores(workers: int, share: int) -> None:
    assert threads.threads_per_worker(workers) == share
    assert threads.chosen_threads(workers) == share
    assert threads.thread_environment(workers) == {
        "OMP_NUM_THREADS": str(share),
        "RAYON_NUM_THREADS": str(share),
    }


@pytest.mark.parametrize(
    ("written", "chosen"), [("3", 3), (" 3 ", 3), ("3,2", 3), ("8", 8), ("64", 8), ("", 4)]
)
def test_threads_of_the_user_win_but_for_more_than_the_cores(
    written: str, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    assert threads.chosen_threads(2) == chosen
    assert threads.set_up_torch(2) == chosen
    assert torch.get_num_threads() == chosen


@pytest.mark.parametrize("written", ["0", "-1", "two", "1.5", "2 3", ",2", "²"])
def test_threads_that_are_no_number_are_refused(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    for ask in (threads.chosen_threads, threads.thread_environment, threads.set_up_torch):
        with pytest.raises(ConfigError) as caught:
            ask(1)
        assert str(caught.value) == (
            f"OMP_NUM_THREADS: expected a whole number of threads >= 1, got {written!r}; mend it, "
            "or unset it for a share of the cores"
        )


@pytest.mark.parametrize(("set_by_user", "expected"), [("5", "5"), ("", "4"), (None, "4")])
def test_threads_reach_a_child_unless_the_user_set_them(
    set_by_user: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("RAYON_NUM_THREADS", set_by_user)
    child = child_environment(defaults=threads.thread_environment(2))
    assert (child["OMP_NUM_THREADS"], child["RAYON_NUM_THREADS"]) == ("4", expected)


COMMANDS = {
    "search": ("pipelines.stages.search.run", ("--task", "intents")),
    "train": ("pipelines.stages.train.run", ("--task", "intents")),
    "evaluate": ("pipelines.stages.evaluate.run", ("--task", "intents")),
    "predict": ("ptv2_core.manifest.load_manifest", ("prompt", "a text")),
    "pull": ("ptv2_serving.store.pull", ("intents", "--to", "prompt")),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("by_user", "expected"), [(None, 8), ("3", 3)])
def test_threads_of_a_bare_command_are_limited_before_its_work(
    command: str,
    by_user: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, arguments = COMMANDS[command]
    seen: list[int] = []

    def stop(*given: Any, **named: Any) -> None:
        seen.append(torch.get_num_threads())
        raise PTv2Error("that is enough")

    write_params(tmp_path, PARAMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, stop)
    if by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", by_user)
    torch.set_num_threads(1)
    assert call(command, *arguments) == 2
    assert seen == [expected]
