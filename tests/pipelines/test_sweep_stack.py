"""Sweeps whose trials share one forward in one process."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepared import Prepared
from pipelines.settings import load_settings
from pipelines.stages.training import backbone_for, start_training
from pipelines.sweep import hosts, training
from pipelines.sweep.host import Trainer
from pipelines.sweep.hosts import CannotGoOnError, Seat
from pipelines.sweep.job import Job
from pipelines.sweep.supervise import Ended, Supervisor
from pipelines.sweep.training import Order
from ptv2_core.errors import ConfigError
from tests.pipelines.fault_parts import COLD_START
from tests.pipelines.sweep_engine import SWEEP, after, open_sweep, run_sweep
from tests.stage_parts import change_params

pytestmark = pytest.mark.slow
N = SWEEP["n_trials"]
PARAMS: dict[str, Any] = {"prompt_length": 4, "learning_rate": 0.01}


@pytest.fixture
def root(
    sweepable: Path, warm_hosts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A workspace without any sweep in it, and the current folder."""
    root = shutil.copytree(sweepable, tmp_path / "space")
    monkeypatch.chdir(root)
    return root


def alone(root: Path, params: dict[str, Any]) -> list[float]:
    """Return the scores of the same training by itself."""
    settings = load_settings(root / "params.yaml").task("intents")
    prepared = Prepared.load(root / "data" / "prepared" / "intents")
    config = Trainer(settings, root).config(job(root, params=params))
    _, reports = start_training(backbone_for(settings, prepared), prepared, config)
    return [one.evaluation.score for one in reports if one.evaluation is not None]


def job(root: Path, number: int = 0, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "params_file": str(root / "params.yaml"),
        "root": str(root),
        "task": "intents",
        "params": PARAMS,
        "checkpoint": str(root / f"{number}.safetensors"),
        "shares_forward": True,
    }
    return Job(**{**given, **changes})


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor()
    yield made
    made.end()


class Heard:
    """Takes epochs; gives up, or fails, at one of them."""

    def __init__(self, *, stop_at: int = 0, fail_at: int = 0) -> None:
        self.scores: list[float] = []
        self._stop_at, self._fail_at = stop_at, fail_at

    def __call__(self, epoch: int, score: float) -> bool:
        self.scores.append(score)
        assert len(self.scores) == epoch
        if epoch == self._fail_at:
            raise ConnectionError("the study is away")
        return epoch == self._stop_at


def run_jobs(supervisor: Supervisor, jobs: list[tuple[Job, Heard]]) -> list[Ended | BaseException]:
    """Train jobs side by side; returns how each ended."""

    def run(one: Job, heard: Heard) -> Ended | BaseException:
        try:
            return supervisor.run(one, heard, retries=1)
        except (ConnectionError, CannotGoOnError) as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda given: run(*given), jobs))


def test_stack_sweep_of_one_worker_is_that_of_one_process(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(root, tmp_path / "other")
    wanted = run_sweep(other, workers=1)
    monkeypatch.setattr(hosts, "_start", COLD_START)
    record = run_sweep(root, engine="stack", workers=1)
    assert [(one.params, one.epochs, one.state) for one in record.trials] == [
        (one.params, one.epochs, one.state) for one in wanted.trials
    ]
    assert record.finalists == wanted.finalists


def test_stack_sweep_trains_all_in_one_process_and_scores_each_as_alone(root: Path) -> None:
    seen: set[int] = set()
    lock, active, most = threading.Lock(), 0, 0

    def train(order: Order) -> Any:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        ended = training.train(order)
        shared = training.supervisor(order.study)._shared
        assert shared is not None
        with lock:
            active -= 1
            seen.add(shared.process.pid)
        return ended

    record = run_sweep(root, train=train, engine="stack", workers=3)
    assert len(seen) == 1
    assert most == 3
    assert [one.number for one in record.trials] == list(range(N))
    assert {one.retries for one in record.trials} == {0}
    for one in record.trials:
        assert list(one.epochs) == alone(root, one.params)[: len(one.epochs)]


def test_stack_sweep_goes_on_from_checkpoints_where_its_process_is_killed(root: Path) -> None:
    def kill(order: Order) -> None:
        supervisor = training.supervisor(order.study)
        while not Path(order.job.checkpoint).exists():
            time.sleep(0.005)
        assert supervisor._shared is not None
        os.kill(supervisor._shared.process.pid, signal.SIGKILL)

    record = run_sweep(root, train=after(2, kill), engine="stack", workers=2)
    assert [one.number for one in record.trials] == list(range(N))
    assert {one.state for one in record.trials} <= {"complete", "pruned"}
    assert record.trials[1].retries == 1
    assert max(one.retries for one in record.trials) == 1
    for one in record.trials:
        assert list(one.epochs) == alone(root, one.params)[: len(one.epochs)]


def test_stack_trial_ends_by_itself_and_the_others_go_on(
    root: Path, supervisor: Supervisor
) -> None:
    wanted = alone(root, PARAMS)
    well, pruned, left = Heard(), Heard(stop_at=1), Heard(fail_at=2)
    long = job(root, 3, params={**PARAMS, "prompt_length": 400})
    ended = run_jobs(
        supervisor,
        [
            (job(root, 0), well),
            (job(root, 1), pruned),
            (job(root, 2), left),
            (long, Heard()),
            (job(root, 4, seed=5), Heard()),
        ],
    )
    first, second, third, fourth, fifth = ended
    assert isinstance(first, Ended)
    assert (first.state, first.retries, well.scores) == ("complete", 0, wanted)
    assert isinstance(second, Ended)
    assert (second.state, pruned.scores) == ("pruned", wanted[:1])
    assert isinstance(third, ConnectionError)
    assert left.scores == wanted[:2]
    assert isinstance(fourth, Ended)
    assert (fourth.state, fourth.retries) == ("failed", 0)
    assert "400 prompt positions" in fourth.message
    assert isinstance(fifth, Ended)
    assert (fifth.state, fifth.retries) == ("complete", 0)
    # and the process is there for the next
    shared = supervisor._shared
    (again,) = run_jobs(supervisor, [(job(root, 5), Heard())])
    assert isinstance(again, Ended)
    assert again.state == "complete"
    assert supervisor._shared is shared


def test_stack_that_cannot_load_says_so_and_marks_no_trial(
    root: Path, supervisor: Supervisor
) -> None:
    shutil.rmtree(root / "data" / "prepared")
    ended = run_jobs(supervisor, [(job(root, number), Heard()) for number in range(2)])
    for one in ended:
        assert isinstance(one, CannotGoOnError)
        assert "run `ptv2 prepare" in str(one)


TOO_LARGE = """
import json, sys

# none of the others is over before one trial was too large twice, whole and by half
def say(name, **message):
    print(json.dumps({"trial": name, **message}), flush=True)

waiting, too_large, told = [], [], 0
for line in sys.stdin:
    order = json.loads(line)
    if "job" not in order:
        if order["say"] == "on":
            say(order["trial"], end=True)
        continue
    is_large = order["job"]["params"]["prompt_length"] == 400
    (too_large if is_large else waiting).append(order["trial"])
    if len(waiting) == 2:
        while told < len(too_large):
            say(too_large[told], memory="MemoryError: too large")
            told += 1
        if told == 2:
            for name in waiting:
                say(name, epoch=1, score=0.5)
"""


def test_stack_trial_that_is_too_large_alone_costs_the_others_nothing(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "stack_host.py"
    program.write_text(TOO_LARGE)
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return start([command[0], str(program)], **options)

    monkeypatch.setattr(hosts, "_start", COLD_START)
    monkeypatch.setattr(hosts.subprocess, "Popen", popen)
    large = job(tmp_path, 2, params={**PARAMS, "prompt_length": 400})
    jobs = [(job(tmp_path, 0), Heard()), (job(tmp_path, 1), Heard()), (large, Heard())]
    first, second, third = run_jobs(supervisor, jobs)
    for one in (first, second):
        assert isinstance(one, Ended)
        assert (one.state, one.retries, one.message) == ("complete", 0, "")
    assert isinstance(third, Ended)
    assert (third.state, third.retries) == ("failed", 0)
    assert third.message == "batches halved, since memory ran out; MemoryError: too large"


def test_stack_process_that_is_stopped_is_ended_and_each_trial_counts_one_death(
    root: Path, supervisor: Supervisor
) -> None:
    class Stops(Heard):
        def __call__(self, epoch: int, score: float) -> bool:
            if not self.scores:
                assert supervisor._shared is not None
                os.kill(supervisor._shared.process.pid, signal.SIGSTOP)
            return super().__call__(epoch, score)

    jobs: list[tuple[Job, Heard]] = [
        (replace(job(root, 0), heartbeat_s=2.0), Stops()),
        (replace(job(root, 1), heartbeat_s=2.0), Heard()),
    ]
    ended = run_jobs(supervisor, jobs)
    wanted = alone(root, PARAMS)
    for one, (_, heard) in zip(ended, jobs, strict=True):
        assert isinstance(one, Ended)
        # killed by us, so nobody halves its batches
        assert (one.state, one.message, heard.scores) == ("complete", "", wanted)
    assert {one.retries for one in ended if isinstance(one, Ended)} <= {0, 1}
    assert any(isinstance(one, Ended) and one.retries == 1 for one in ended)


def test_stack_seat_is_told_of_the_end_of_a_process_that_was_gone(
    root: Path, supervisor: Supervisor
) -> None:
    (ended,) = run_jobs(supervisor, [(job(root), Heard())])
    assert isinstance(ended, Ended)
    assert supervisor._shared is not None
    seat = supervisor._shared.seat()
    assert isinstance(seat, Seat)
    assert seat.kill() == 0  # it ran until then
    seat.begin(job(root))
    assert seat.receive(5.0) is None
    assert not seat.is_alive


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.method": "finetune", "train.learning_rate": 1e-4}, r"train\.method: trials of"),
        ({"train.backbone_dropout": True}, r"train\.backbone_dropout: trials that share"),
    ],
)
def test_stack_sweep_refuses_what_cannot_share_a_forward(
    root: Path, changes: dict[str, Any], said: str
) -> None:
    change_params(root, changes)
    with pytest.raises(ConfigError, match=said), open_sweep(root, engine="stack"):
        pass
