"""Sweeps under fire: whatever is killed, stopped or full, a study ends with exactly its trials."""

import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.paths import TaskPaths
from pipelines.sweep import trials
from pipelines.sweep.record import SweepRecord
from tests.pipelines.chain_parts import make_repository
from tests.pipelines.fault_parts import (
    ROW_BYTES,
    Coordinator,
    Nursery,
    check_is_quiet,
    ended_trials,
    litter,
    rows,
    running_trials,
)
from tests.pipelines.postgres import Postgres
from tests.pipelines.processes import Running, environment, processes, program
from tests.pipelines.sweep_engine import SWEEP, open_sweep
from tests.registry_parts import empty_registry
from tests.stage_parts import PARAMS, change_params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at processes in /proc"),
]
N = SWEEP["n_trials"]
KILLS_PER_SWEEP = 8


@pytest.fixture
def root(sweepable: Path, tmp_path: Path) -> Path:
    """A workspace without any sweep in it."""
    return shutil.copytree(sweepable, tmp_path / "space")


@pytest.fixture(scope="module")
def undisturbed(
    sweepable: Path, warm: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> SweepRecord:
    """What a sweep finds that nothing happens to."""
    root = shutil.copytree(sweepable, tmp_path_factory.mktemp("whole") / "space")
    return warm.start(root, workers=1).record()


def essence(record: SweepRecord) -> Any:
    """Return what may not depend on what died: all but times, and how often something died."""
    ended = [replace(one, seconds=0.0, retries=0) for one in record.trials]
    return ended, record.finalists, record.asked, record.stopped


def check_is_exact(record: SweepRecord, root: Path, storage: str | None = None) -> None:
    """Check what holds for any sweep, whatever became of its processes."""
    place = storage or root
    assert [one.number for one in record.trials] == list(range(N))
    assert {one.state for one in record.trials} <= {"complete", "pruned"}
    for one in record.trials:
        assert one.value == max(one.epochs)
        assert (len(one.epochs) == 3) is (one.state == "complete")
    ended = rows(place, "SELECT number FROM trials WHERE state IN ('COMPLETE', 'PRUNED')")
    assert sorted(number for (number,) in ended) == list(range(N))
    assert rows(place, "SELECT count(*) FROM studies") == [(1,)]
    assert [len(one.scores) for one in record.finalists] == [2, 2]
    check_is_quiet(root)
    assert litter(root) == []


def check_is_logged_once(root: Path) -> None:
    with closing(sqlite3.connect(root / "mlflow.db")) as connection:

        def ask(query: str) -> list[Any]:
            return connection.execute(query).fetchall()

        runs = ask("SELECT run_uuid FROM tags WHERE key='ptv2.kind' AND value='sweep'")
        assert len(runs) == 1
        children = ask("SELECT value FROM tags WHERE key='ptv2.trial'")
        assert sorted(int(number) for (number,) in children) == list(range(N))
        assert ask("SELECT DISTINCT status FROM runs") == [("FINISHED",)]


class Fire:
    """Kills at random, the same for the same seed as far as times allow."""

    def __init__(self, seed: int) -> None:
        self.chooser = random.Random(seed)
        self.hosts = 0
        self.coordinators = 0

    @property
    def kills(self) -> int:
        return self.hosts + self.coordinators

    def sweep(
        self,
        warm: Nursery,
        root: Path,
        kills: int,
        *,
        workers: int,
        finish: bool,
        engine: str = "processes",
        storage: str | None = None,
    ) -> SweepRecord:
        """Sweep to the end, with so many kills on the way."""
        left, place = kills, storage or root
        while True:
            coordinator = warm.start(
                root, workers=workers, retries=100, finish=finish, engine=engine, storage=storage
            )
            # a trial whose host is killed twice trains smaller batches: another training
            next_host = 0
            while left and coordinator.code() is None:
                is_host = self.chooser.random() < 0.5
                self._wait(coordinator, place, is_host, finish)
                hosts, ended = coordinator.hosts(), ended_trials(place)
                if is_host and hosts and ended >= next_host:
                    with suppress(ProcessLookupError):
                        os.kill(self.chooser.choice(hosts), signal.SIGKILL)
                        self.hosts, left = self.hosts + 1, left - 1
                    next_host = ended + 2
                elif not is_host and coordinator.code() is None:
                    coordinator.kill()
                    self.coordinators, left = self.coordinators + 1, left - 1
                    coordinator.wait()
            if coordinator.wait() != -signal.SIGKILL:
                return coordinator.record()

    def _wait(
        self, coordinator: Coordinator, place: Path | str, is_host: bool, finish: bool
    ) -> None:
        """Wait for a moment anywhere in a sweep, from its first to its last."""
        at = min(N, ended_trials(place) + self.chooser.choice((0, 0, 1, 2)))
        coordinator.wait_until(
            lambda: (
                coordinator.code() is not None
                or (ended_trials(place) >= at and (coordinator.hosts() or not is_host))
            )
        )
        longest_s = 3.0 if finish and at == N else 0.6
        until = time.monotonic() + self.chooser.uniform(0.0, longest_s)
        while coordinator.code() is None and time.monotonic() < until:
            time.sleep(0.01)


@pytest.mark.parametrize(
    "kills",
    [12, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(2400)])],
)
def test_sweep_ends_with_exactly_its_trials_whatever_is_killed(
    warm: Nursery, sweepable: Path, undisturbed: SweepRecord, tmp_path: Path, kills: int
) -> None:
    fire = Fire(seed=kills)
    count = 0
    while fire.kills < kills:
        root = shutil.copytree(sweepable, tmp_path / f"space-{count}")
        finish, workers = count % 3 == 1, 2 if count % 3 == 2 else 1
        here = min(KILLS_PER_SWEEP, kills // 3, kills - fire.kills)
        record = fire.sweep(warm, root, here, workers=workers, finish=finish)
        check_is_exact(record, root)
        if workers == 1:
            assert essence(record) == essence(undisturbed)
        if finish:
            check_is_logged_once(root)
            assert warm.start(root, finish=True).wait() == 0
            check_is_logged_once(root)
            assert SweepRecord.read(TaskPaths(root=root, task="intents")).trials == record.trials
        shutil.rmtree(root)
        count += 1
    print(f"{count} sweeps, {fire.coordinators} coordinators and {fire.hosts} hosts killed")


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.long)])
def test_sweep_on_postgresql_ends_with_exactly_its_trials_whatever_is_killed(
    warm: Nursery,
    sweepable: Path,
    undisturbed: SweepRecord,
    postgres: Postgres,
    tmp_path: Path,
    kills: int,
) -> None:
    fire = Fire(seed=kills)
    count = 0
    while fire.kills < kills:
        root = shutil.copytree(sweepable, tmp_path / f"space-{count}")
        storage, here = postgres.new_database(), min(KILLS_PER_SWEEP, kills - fire.kills)
        workers = 1 + count % 2
        record = fire.sweep(warm, root, here, workers=workers, finish=False, storage=storage)
        check_is_exact(record, root, storage)
        if workers == 1:
            assert essence(record) == essence(undisturbed)
        count += 1
    print(f"{count} sweeps, {fire.coordinators} coordinators and {fire.hosts} hosts killed")


@pytest.mark.parametrize("workers", [1, 3])
def test_sweep_in_one_forward_ends_with_exactly_its_trials_whatever_is_killed(
    warm: Nursery, root: Path, undisturbed: SweepRecord, workers: int
) -> None:
    fire = Fire(seed=workers)
    record = fire.sweep(warm, root, 4, workers=workers, finish=False, engine="stack")
    check_is_exact(record, root)
    if workers == 1:
        assert essence(record) == essence(undisturbed)


@pytest.mark.parametrize("pruner", ["none", "median", "successive_halving", "hyperband"])
def test_sweep_prunes_the_same_trials_whatever_is_killed(
    warm: Nursery, root: Path, tmp_path: Path, pruner: str
) -> None:
    change_params(root, {"search.pruner": pruner, "search.grace_epochs": 1})
    whole = shutil.copytree(root, tmp_path / "whole")
    undisturbed = warm.start(whole, workers=1).record()
    record = Fire(seed=4).sweep(warm, root, 4, workers=1, finish=False)
    check_is_exact(record, root)
    assert essence(record) == essence(undisturbed)


def test_sweep_draws_on_as_it_would_have_where_it_died_while_it_drew(
    root: Path, undisturbed: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(trial: Any, space: Any) -> Any:
        trial.suggest_int("prompt_length", *space.prompt_length, log=True)
        raise KeyboardInterrupt

    with open_sweep(root) as dead:
        assert dead.study.ask(N) is not None
        monkeypatch.setattr(trials, "suggest", die)
        with pytest.raises(KeyboardInterrupt):
            dead.study.ask(N)
    monkeypatch.undo()
    with open_sweep(root) as sweep:
        asked = [sweep.study.ask(N), sweep.study.ask(N)]
    assert [one and one.params for one in asked] == [one.params for one in undisturbed.trials[:2]]


def training(coordinator: Coordinator, root: Path) -> int:
    """Return a host that trains a trial, once there is one."""
    coordinator.wait_until(lambda: coordinator.hosts() and running_trials(root))
    return coordinator.hosts()[0]


def test_sweep_loses_nothing_while_its_coordinator_is_stopped(
    warm: Nursery, root: Path, undisturbed: SweepRecord
) -> None:
    coordinator = warm.start(root, workers=1, heartbeat_s=1.0)
    training(coordinator, root)
    coordinator.kill(signal.SIGSTOP)
    time.sleep(2.5)
    coordinator.kill(signal.SIGCONT)
    record = coordinator.record()
    check_is_exact(record, root)
    assert essence(record) == essence(undisturbed)


def test_sweep_halves_batches_of_a_trial_whose_process_is_killed_twice(
    warm: Nursery, root: Path
) -> None:
    coordinator = warm.start(root, workers=1)
    first = training(coordinator, root)
    os.kill(first, signal.SIGKILL)
    coordinator.wait_until(lambda: coordinator.hosts() not in ([], [first]))
    os.kill(coordinator.hosts()[0], signal.SIGKILL)
    record = coordinator.record()
    check_is_exact(record, root)
    assert (record.trials[0].retries, record.trials[0].message) == (
        2,
        "batches halved, since its process was killed twice",
    )
    assert [one.message for one in record.trials[1:]] == [""] * (N - 1)


def test_sweep_halves_batches_once_where_memory_runs_out(warm: Nursery, root: Path) -> None:
    # batches of 16 rows do not fit, those of 8 do
    record = warm.start(root, workers=1, host_memory=12 * ROW_BYTES).record()
    check_is_exact(record, root)
    assert {one.message for one in record.trials} == {"batches halved, since memory ran out"}
    assert {one.retries for one in record.trials} == {0}


def test_sweep_says_where_memory_is_too_small_for_half_a_batch(warm: Nursery, root: Path) -> None:
    coordinator = warm.start(root, workers=1, n_trials=2, host_memory=4 * ROW_BYTES)
    assert coordinator.wait() == 2
    assert "none of 2 trials of intents ended with a score" in coordinator.said
    assert "batches halved, since memory ran out; RuntimeError: " in coordinator.said
    assert "alloc" in coordinator.said


def test_sweep_stops_where_checkpoints_find_no_room_and_goes_on_with_room(
    warm: Nursery, root: Path, undisturbed: SweepRecord
) -> None:
    full = warm.start(root, workers=1, host_file_limit=1000)
    assert full.wait() == 2
    assert "the checkpoint could not be written (File too large); make room" in full.said
    assert ended_trials(root) == 0
    check_is_quiet(root)
    record = warm.start(root, workers=1).record()
    check_is_exact(record, root)
    assert essence(record) == essence(undisturbed)


def test_sweep_stops_where_its_database_finds_no_room_and_goes_on_with_room(
    warm: Nursery, root: Path, undisturbed: SweepRecord
) -> None:
    warm.start(root, workers=1, n_trials=2, seeds=1).record()
    # the table of final scores lies beyond what can be written
    ((page, size),) = rows(
        root,
        "SELECT rootpage - 1, page_size FROM sqlite_master, pragma_page_size "
        "WHERE name = 'trial_values'",
    )
    full = warm.start(root, workers=1, file_limit=page * size)
    assert full.wait() == 2
    assert "the study's database cannot be used" in full.said
    assert "the same command goes on" in full.said
    assert 2 <= ended_trials(root) < N
    check_is_quiet(root)
    record = warm.start(root, workers=1).record()
    check_is_exact(record, root)
    assert essence(record) == essence(undisturbed)


def test_sweep_says_where_its_page_finds_no_room_and_trains_nothing_again(
    warm: Nursery, root: Path
) -> None:
    full = warm.start(root, workers=1, finish=True, file_limit=2_000_000)
    assert full.wait() == 2
    assert "results/sweeps/intents: could not be written (File too large); make room" in full.said
    began = rows(root, "SELECT datetime_start FROM trials")
    record = warm.start(root, workers=1, finish=True).record()
    check_is_exact(record, root)
    check_is_logged_once(root)
    assert rows(root, "SELECT datetime_start FROM trials") == began


def test_sweep_refuses_a_second_coordinator_while_the_first_lives(
    warm: Nursery, root: Path, undisturbed: SweepRecord
) -> None:
    first = warm.start(root, workers=1)
    training(first, root)
    first.kill(signal.SIGSTOP)
    second = warm.start(root, workers=1)
    assert second.wait() == 2
    assert "sweep: another sweep of this task is running" in second.said
    assert "wait for it or stop it" in second.said
    first.kill()
    assert first.wait() == -signal.SIGKILL
    record = warm.start(root, workers=1).record()
    check_is_exact(record, root)
    assert essence(record) == essence(undisturbed)


# `ptv2 sweep` itself, under Prefect


def repository(root: Path) -> Path:
    """Return a repository whose one task may be swept."""
    made = make_repository(
        root,
        {"intents": PARAMS["tasks"]["intents"]},
        search={**PARAMS["search"], "epochs": 3},
        sweep=SWEEP,
        run={**PARAMS["run"], "checkpoint_s": 0},
    )
    (made / "mlflow.db").write_bytes(empty_registry())
    return made


def start_command(root: Path) -> Running:
    command = (program(), "sweep", "--task", "intents", "--workers", "1")
    return Running(root, *command, environment=environment())


def hosts(root: Path) -> list[int]:
    return [pid for pid, command in processes(root).items() if "pipelines.sweep.host" in command]


def flow_states(root: Path) -> list[tuple[str, str]]:
    """Return name and state of the flow runs, the oldest first."""
    with closing(sqlite3.connect(root / ".ptv2" / "prefect" / "prefect.db")) as connection:
        return connection.execute(
            "SELECT flow.name, flow_run.state_type FROM flow_run JOIN flow "
            "ON flow.id = flow_run.flow_id ORDER BY flow_run.created"
        ).fetchall()


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (Running.interrupt, "CANCELLED"),
        # what Prefect itself makes of SIGTERM
        pytest.param(Running.terminate, "CRASHED", marks=pytest.mark.long),
    ],
)
def test_sweep_command_ends_all_when_it_is_interrupted(
    warm: Nursery,
    tmp_path: Path,
    undisturbed: SweepRecord,
    end: Callable[[Running], int],
    state: str,
) -> None:
    root = repository(tmp_path / "space")
    running = start_command(root)
    running.wait_until(lambda: ended_trials(root) >= 1 and running_trials(root))
    assert end(running) == 130, running.said
    assert "interrupted; the same command goes on from what is finished" in running.said
    running.wait_until_all_is_gone()
    assert flow_states(root) == [("ptv2-sweep", state), ("ptv2-sweep-task", state)]
    record = warm.start(root, workers=1).record()
    check_is_exact(record, root)
    assert essence(record) == essence(undisturbed)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_sweep_command_ends_with_exactly_its_trials_whatever_is_killed(
    tmp_path: Path, undisturbed: SweepRecord
) -> None:
    root = repository(tmp_path / "space")
    for kill_at in (0, 2, 4):
        running = start_command(root)
        running.wait_until(lambda at=kill_at: hosts(root) and ended_trials(root) >= at)
        os.kill(hosts(root)[0], signal.SIGKILL)
        running.wait_until(lambda at=kill_at: ended_trials(root) > at)
        running.kill()
        running.wait_until_all_is_gone()
    running = start_command(root)
    assert running.wait() == 0, running.said
    running.wait_until_all_is_gone()
    assert "swept intents: " in running.said
