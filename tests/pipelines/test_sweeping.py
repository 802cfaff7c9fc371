"""Sweeps end with exactly their trials, whatever dies on the way."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.prepared import Prepared
from pipelines.settings import load_settings
from pipelines.stages.lanes import trial_config
from pipelines.stages.training import backbone_for, start_training
from pipelines.sweep import hosts, training
from pipelines.sweep.host import Trainer
from pipelines.sweep.hosts import CannotGoOnError, Trains
from pipelines.sweep.job import Job
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.supervise import Supervisor
from pipelines.sweep.sweeping import Look, overlaid
from pipelines.sweep.training import Order
from ptv2_core.errors import ConfigError, MemoryRanOutError
from ptv2_core.training.stepping import is_memory
from tests.pipelines.fault_parts import COLD_START
from tests.pipelines.sweep_engine import SWEEP, after, open_sweep, run_sweep
from tests.stage_parts import change_params

pytestmark = pytest.mark.slow
N = SWEEP["n_trials"]


@pytest.fixture
def root(sweepable: Path, warm_hosts: None, tmp_path: Path) -> Path:
    """A workspace without any sweep in it."""
    return shutil.copytree(sweepable, tmp_path / "space")


@pytest.fixture(scope="module")
def swept(
    sweepable: Path, warm_hosts: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SweepRecord, list[Look]]:
    """A workspace with a finished sweep."""
    root = shutil.copytree(sweepable, tmp_path_factory.mktemp("swept") / "space")
    looks: list[Look] = []
    return root, run_sweep(root, on_look=looks.append, workers=1), looks


def host_of(order: Order) -> Trains:
    """Return the process that trains, once there is one."""
    supervisor = training.supervisor(order.study)
    while True:
        for host in list(supervisor._busy):
            if host.has_spoken:
                return host
        time.sleep(0.01)


def check_counts(record: SweepRecord, trials: int = N) -> None:
    assert [one.number for one in record.trials] == list(range(trials))
    assert len(record.finalists) == 2


def test_sweep_trains_its_trials_and_the_best_with_more_seeds(
    swept: tuple[Path, SweepRecord, list[Look]],
) -> None:
    _, record, looks = swept
    check_counts(record)
    assert record.trials[0].origin == "baseline"
    assert record.trials[0].params == {"prompt_length": 4, "learning_rate": 0.01}
    complete = [one for one in record.trials if one.state == "complete"]
    assert all(one.value == max(one.epochs) and len(one.epochs) == 3 for one in complete)
    best = sorted(complete, key=lambda one: (-(one.value or 0), one.number))[:2]
    assert {one.number for one in record.finalists} == {one.number for one in best}
    ranks = [one.rank for one in record.finalists]
    assert ranks == sorted(ranks, reverse=True)
    assert all(len(one.scores) == 2 for one in record.finalists)
    assert looks[0].ended == ()
    assert {one.number for look in looks for one in look.running} == set(range(N))


def test_sweep_scores_a_trial_as_the_same_training_by_itself_does(
    swept: tuple[Path, SweepRecord, list[Look]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, record, _ = swept
    monkeypatch.chdir(root)
    settings = load_settings(root / "params.yaml").task("intents")
    prepared = Prepared.load(root / "data" / "prepared" / "intents")
    trial = record.winner
    config = trial_config(settings, trial.changes)
    _, reports = start_training(backbone_for(settings, prepared), prepared, config)
    alone = [one.evaluation.score for one in reports if one.evaluation is not None]
    assert list(trial.epochs) == alone


def test_sweep_that_is_done_trains_nothing_more(
    swept: tuple[Path, SweepRecord, list[Look]],
) -> None:
    root, record, _ = swept

    def refuse(order: Order) -> None:
        raise AssertionError("nothing is left to train")

    again = run_sweep(root, train=refuse)
    assert again.trials == record.trials
    assert again.finalists == record.finalists


def test_sweep_can_be_made_longer_and_is_the_same_for_the_same_seed(
    swept: tuple[Path, SweepRecord, list[Look]], root: Path
) -> None:
    _, whole, _ = swept
    run_sweep(root, workers=1, n_trials=2)
    longer = run_sweep(root, workers=1)
    assert [(one.params, one.epochs, one.state) for one in longer.trials] == [
        (one.params, one.epochs, one.state) for one in whole.trials
    ]


def test_sweep_goes_on_from_the_checkpoint_of_a_killed_process(
    swept: tuple[Path, SweepRecord, list[Look]], root: Path
) -> None:
    _, whole, _ = swept

    def kill(order: Order) -> None:
        host = host_of(order)
        while not Path(order.job.checkpoint).exists():
            time.sleep(0.005)
        os.kill(host.pid, signal.SIGKILL)

    record = run_sweep(root, train=after(2, kill), workers=1)
    check_counts(record)
    # the scores are those of a training that nobody killed
    assert [one.epochs for one in record.trials] == [one.epochs for one in whole.trials]
    killed = record.trials[1]
    assert (killed.state, killed.retries) == (whole.trials[1].state, 1)


def test_sweep_kills_a_process_that_is_stopped(root: Path) -> None:
    record = run_sweep(
        root,
        train=after(1, lambda order: os.kill(host_of(order).pid, signal.SIGSTOP)),
        workers=1,
        n_trials=2,
        heartbeat_s=2.0,
    )
    check_counts(record, 2)
    assert [one.retries for one in record.trials] == [1, 0]
    assert [one.state for one in record.trials].count("crashed") == 0


def test_sweep_gives_a_trial_up_whose_process_dies_again_and_again(root: Path) -> None:
    def kill_all(order: Order) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for host in list(training.supervisor(order.study)._busy):
                os.kill(host.pid, signal.SIGKILL)
            time.sleep(0.05)
            with_crash = _crashed(order)
            if with_crash:
                return

    def _crashed(order: Order) -> bool:
        study = training._study(order.url, order.study, order.search)
        return any(one.number == order.number for one in study.trials())

    record = run_sweep(root, train=after(2, kill_all), workers=1, n_trials=4, retries=1)
    check_counts(record, 4)
    crashed = record.trials[1]
    assert (crashed.state, crashed.value, crashed.retries) == ("crashed", None, 2)
    assert crashed.message == "its process ended with exit code -9"


def test_sweep_records_a_trial_that_fails_with_its_message(root: Path) -> None:
    change_params(root, {"train.prompt.start_std": 1e38})
    with pytest.raises(PipelineError, match="none of 2 trials of intents ended with a score") as it:
        run_sweep(root, n_trials=2)
    assert "are not both finite" in str(it.value)
    with open_sweep(root) as sweep:
        assert [(one.state, one.retries) for one in sweep.study.trials()] == [("failed", 0)] * 2


def test_sweep_is_refused_where_another_works_on_it(root: Path) -> None:
    with open_sweep(root), pytest.raises(PipelineError, match="another sweep of this task"):
        run_sweep(root)


def test_sweep_takes_over_what_a_dead_one_left(
    swept: tuple[Path, SweepRecord, list[Look]], root: Path
) -> None:
    _, whole, _ = swept
    with open_sweep(root) as dead:
        left = [dead.study.ask(N), dead.study.ask(N)]  # it began two and died
    assert [one.number for one in left if one] == [0, 1]
    record = run_sweep(root, workers=1)
    check_counts(record)
    assert record.trials[0].epochs == whole.trials[0].epochs


def test_sweep_stops_when_trial_after_trial_gains_nothing(root: Path) -> None:
    record = run_sweep(root, n_trials=12, workers=1, patience=2, margin=1.0)
    check_counts(record, 3)
    assert record.asked == 12
    assert record.stopped == "none of the last 2 trials gained more than 1 on dev"


def test_sweep_tries_what_was_best_before(
    swept: tuple[Path, SweepRecord, list[Look]], tmp_path: Path
) -> None:
    done, record, _ = swept
    root = shutil.copytree(done, tmp_path / "space")
    change_params(root, {"train.batch_size": 8})  # another study
    best = max(record.trials, key=lambda one: one.value or 0.0)
    with open_sweep(root, transfer=1) as sweep:
        asked = [sweep.study.ask(3) for _ in range(2)]
        assert [one.params for one in asked if one] == [record.trials[0].params, best.params] or (
            best.number == 0
        )
        assert sweep.study.running()[0].origin == "baseline"


def job_of(root: Path, **changes: Any) -> Job:
    with open_sweep(root) as sweep:
        asked = sweep.study.ask(N)
        assert asked is not None
        return replace(sweep.order(asked).job, params_file=str(root / "params.yaml"), **changes)


def test_host_halves_batches_for_want_of_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(root)
    monkeypatch.chdir(root)
    trainer = Trainer(load_settings(root / "params.yaml").task("intents"), root)
    whole, half = trainer.config(job), trainer.config(replace(job, halvings=1))
    assert (half.batch_size, half.token_budget) == (whole.batch_size // 2, whole.token_budget // 2)
    assert replace(half, batch_size=16, token_budget=whole.token_budget) == whole


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("size mismatch"), False),
        (MemoryRanOutError("batches of 64"), True),
        (ValueError("out of memory"), False),
    ],
)
def test_host_knows_want_of_memory(error: Exception, expected: bool) -> None:
    assert is_memory(error) is expected


def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> Job:
    """Let hosts be a program of a test, told its number by a file."""
    program = tmp_path / "host.py"
    program.write_text(
        "import json, os, sys, pathlib\n"
        "count = pathlib.Path('count'); n = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(n + 1))\n"
        "job = json.loads(sys.stdin.readline())\n"
        "def say(**m): print(json.dumps(m), flush=True)\n" + script
    )
    monkeypatch.setattr(hosts, "_start", COLD_START)
    started: Callable[..., Any] = hosts.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return started([command[0], str(program)], **options)

    monkeypatch.setattr(hosts.subprocess, "Popen", popen)
    return Job(
        params_file="", root=str(tmp_path), task="t", params={}, checkpoint=str(tmp_path / "c")
    )


def test_supervisor_halves_batches_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = (
        "if job['halvings'] == 0: say(memory='MemoryError: no room'); sys.stdin.readline()\n"
        "say(epoch=1, score=0.5); sys.stdin.readline(); say(end=True); sys.stdin.readline()\n"
    )
    job = scripted(monkeypatch, tmp_path, script)
    scores: list[tuple[int, float]] = []
    supervisor = Supervisor()
    ended = supervisor.run(job, lambda *given: bool(scores.append(given)), retries=0)
    supervisor.end()
    assert (ended.state, ended.retries) == ("complete", 0)
    assert ended.message == "batches halved, since memory ran out"
    assert scores == [(1, 0.5)]


def test_supervisor_tells_each_epoch_once_however_often_a_host_dies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = (
        "for e in range(1, n + 2): say(epoch=e, score=e / 10); sys.stdin.readline()\n"
        "if n < 2: os._exit(7)\n"
        "say(end=True); sys.stdin.readline()\n"
    )
    job = scripted(monkeypatch, tmp_path, script)
    scores: list[tuple[int, float]] = []
    crashes: list[str] = []
    supervisor = Supervisor()
    ended = supervisor.run(
        job, lambda *given: bool(scores.append(given)), retries=2, on_crash=crashes.append
    )
    supervisor.end()
    assert (ended.state, ended.retries) == ("complete", 2)
    assert scores == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert crashes == ["its process ended with exit code 7"] * 2


def test_supervisor_gives_up_a_trial_that_is_to_be_pruned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = (
        "say(epoch=1, score=0.1)\n"
        "pathlib.Path('told').write_text(sys.stdin.readline()); sys.stdin.readline()\n"
    )
    job = scripted(monkeypatch, tmp_path, script)
    supervisor = Supervisor()
    ended = supervisor.run(job, lambda epoch, score: True, retries=0)
    supervisor.end()
    assert ended.state == "pruned"


def test_sweep_stops_where_its_data_has_changed_or_is_gone_and_marks_no_trial(root: Path) -> None:
    """As while `dvc repro` writes it anew: only a host that starts meanwhile can notice."""
    file = root / "data" / "prepared" / "intents" / "task.json"
    right = file.read_text()
    with open_sweep(root) as sweep:
        asked = sweep.study.ask(N)
        assert asked is not None
        order = sweep.order(asked)
        file.unlink()
        words = r"cannot be loaded: .*task\.json: not there; run `ptv2 prepare .* the same command"
        with pytest.raises(CannotGoOnError, match=words):
            training.train(order)
        file.write_text(right.replace('"train": "sha256:', '"train": "sha256:0'))
        words = "data/prepared of intents: expected sha256:.*, got sha256:.*begins a new study"
        with pytest.raises(CannotGoOnError, match=words):
            training.train(order)
        assert "data/prepared of intents" in sweep.study.take_stop(asked.number)
        assert not sweep.study.trials()
        file.write_text(right)
        ended = training.train(order)
        assert (ended.state, ended.retries) == ("complete", 0)


def test_sweep_stops_where_a_worker_does_not_see_the_workspace(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_start", COLD_START)
    with open_sweep(root) as sweep:
        asked = sweep.study.ask(N)
        assert asked is not None
        order = sweep.order(asked)
        elsewhere = replace(order, job=replace(order.job, root=str(tmp_path / "nowhere")))
        with pytest.raises(CannotGoOnError, match="nowhere: expected the workspace of the sweep"):
            training.train(elsewhere)
        assert "have it at the same path" in sweep.study.take_stop(asked.number)
        assert sweep.study.retries(asked.number) == 0


def test_sweep_that_was_ended_trains_nothing_for_a_thread_that_comes_late(root: Path) -> None:
    with open_sweep(root) as sweep:
        asked = sweep.study.ask(N)
        assert asked is not None
        training.end(sweep.study.name)
        with pytest.raises(PipelineError, match="the sweep is ending"):
            training.train(sweep.order(asked))
        assert sweep.study.retries(asked.number) == 0
    with open_sweep(root) as again:
        assert training.supervisor(again.study.name)._take(again.order(asked).job).is_alive


def test_sweep_names_an_option_that_is_out_of_its_range() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.workers: .*1 to 1024.*got 5000"):
        overlaid(SweepSettings(), {"n_trials": None, "workers": 5000})
    assert overlaid(SweepSettings(), {"n_trials": 3, "workers": None}).n_trials == 3
