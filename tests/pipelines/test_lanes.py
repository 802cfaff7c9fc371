"""Trials side by side: in turn, in processes, in one forward; the scores are the same in all."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.schema import SearchSettings
from pipelines.settings import TaskSettings, load_settings
from pipelines.stages import lanes as lanes_module
from pipelines.stages.lanes import Stacked, Workers, open_lanes
from pipelines.stages.search import Screen, rank_correlation
from pipelines.stages.training import backbone_for
from pipelines.study import Lanes, OneByOne, Outcome, Study, Trial
from ptv2_core.errors import ConfigError, TrainingError
from ptv2_core.model.backbones.base import Backbone
from tests.stage_parts import call, change_params, make_workspace

Parts = tuple[TaskSettings, TaskPaths, Prepared, Backbone]
FAST: dict[str, Any] = {"prompt": {"length": 4}, "learning_rate": 1e-2}
WIDE: dict[str, Any] = {"prompt": {"length": 7, "layers": 2}, "learning_rate": 3e-2}
EPOCHS = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """A prepared task, with the workspace as the current folder."""
    root = make_workspace(tmp_path_factory.mktemp("lanes") / "space")
    change_params(root, {"search.epochs": EPOCHS, "search.n_trials": 5, "search.parallel": 2})
    before = Path.cwd()
    assert call("fetch", "-t", "intents", "-C", str(root)) == 0
    assert call("prepare", "-t", "intents", "-C", str(root)) == 0
    os.chdir(root)
    settings = load_settings(Path("params.yaml")).task("intents")
    paths = TaskPaths(root=Path(), task="intents")
    prepared = Prepared.load(paths.prepared)
    yield settings, paths, prepared, backbone_for(settings, prepared)
    os.chdir(before)


def drain(lanes: Lanes, lane: int) -> list[float]:
    """Return all scores of a lane's trial."""
    found = []
    while (score := lanes.next(lane)) is not None:
        found.append(score)
    return found


def in_turn(parts: Parts, *trials: dict[str, Any]) -> list[list[float]]:
    """Return each trial's scores, trained alone."""
    settings, _, prepared, backbone = parts

    def scores(changes: Any) -> Iterator[float]:
        return lanes_module._scores(settings, prepared, backbone, None, None, changes)

    alone = OneByOne(scores)
    results = []
    for trial in trials:
        alone.start(0, trial)
        results.append(drain(alone, 0))
    return results


@pytest.fixture(scope="module")
def workers(parts: Parts) -> Iterator[Workers]:
    """Two processes; each test leaves its lanes free."""
    settings, paths, _, _ = parts
    found = Workers(settings, paths, processes=2, threads=1)
    yield found
    found.close()


@pytest.mark.slow
def test_lanes_in_processes_give_the_scores_of_one_process(parts: Parts, workers: Workers) -> None:
    workers.start(0, FAST)
    workers.start(1, WIDE)
    workers.start(2, WIDE)  # shares a process with lane 0
    first = workers.next(0)
    together = [[first, *drain(workers, 0)], drain(workers, 1), drain(workers, 2)]
    assert together == in_turn(parts, FAST, WIDE, WIDE)
    assert [len(scores) for scores in together] == [EPOCHS] * 3


@pytest.mark.slow
def test_lanes_in_processes_forget_a_trial_that_was_given_up(
    parts: Parts, workers: Workers
) -> None:
    workers.start(0, WIDE)
    workers.next(0)
    workers.stop(0)
    workers.start(0, FAST)
    assert [drain(workers, 0)] == in_turn(parts, FAST)


@pytest.mark.slow
def test_lanes_in_processes_tell_what_went_wrong(parts: Parts, workers: Workers) -> None:
    workers.start(0, {"prompt": {"length": 60}})
    with pytest.raises(PipelineError, match=r"train\.prompt\.length: 60 prompt positions"):
        workers.next(0)
    workers.start(1, {"prompt": {"start_std": 1e38}})
    with pytest.raises(TrainingError, match="not both finite"):
        workers.next(1)
    workers.start(1, FAST)  # the process lives
    assert [drain(workers, 1)] == in_turn(parts, FAST)


@pytest.mark.slow
def test_lanes_say_that_a_process_was_killed(parts: Parts) -> None:
    settings, paths, _, _ = parts
    workers = Workers(settings, paths, processes=2, threads=1)
    workers.start(0, FAST)
    pid = workers._processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(PipelineError, match="ended with exit code -9 .*no finished trial is lost"):
        drain(workers, 0)
    workers.start(1, FAST)
    assert len(drain(workers, 1)) == EPOCHS
    workers.close()


@pytest.mark.slow
def test_lanes_say_why_a_process_cannot_begin(parts: Parts) -> None:
    settings, paths, _, _ = parts
    backbone = settings.backbone.model_copy(update={"name": "./elsewhere"})
    workers = Workers(replace(settings, backbone=backbone), paths, processes=1, threads=1)
    workers.start(0, FAST)
    workers.start(1, FAST)
    with pytest.raises(PipelineError, match=r"backbone\.name: './elsewhere' is not there"):
        workers.next(0)
    workers.close()


def work_far_ahead(pipe: Connection, *_: Any) -> None:
    """Score all trials again and again, and read what is sent between two rounds only."""
    running = set()
    with suppress(EOFError, ConnectionError):
        while True:
            while not running or pipe.poll():
                ticket, changes = pipe.recv()
                if changes is None:
                    running.remove(ticket)
                else:
                    running.add(ticket)
            for ticket in running:
                pipe.send((ticket, 0.5))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_lanes_are_given_up_while_their_process_waits_for_room_for_scores(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "_work", work_far_ahead)
    settings, paths, _, _ = parts
    workers = Workers(settings, paths, processes=1, threads=1)
    lanes = range(256)
    for lane in lanes:
        workers.start(lane, FAST)
    for _ in range(4):
        assert [workers.next(lane) for lane in lanes] == [0.5] * 256
        for lane in lanes:
            workers.stop(lane)
        for lane in lanes:
            workers.start(lane, {**FAST, "learning_rate": 1e-3})
    workers.close()


def test_lanes_in_one_forward_give_the_scores_of_trials_alone(parts: Parts) -> None:
    settings, _, prepared, backbone = parts
    stacked = Stacked(settings, prepared, backbone, None)
    stacked.start(0, FAST)
    stacked.start(1, WIDE)
    first = stacked.next(0)
    stacked.stop(1)
    stacked.start(1, FAST)
    assert [[first, *drain(stacked, 0)], drain(stacked, 1)] == in_turn(parts, FAST, FAST)
    stacked.start(0, {"prompt": {"start_std": 1e38}})
    with pytest.raises(TrainingError, match="not both finite"):
        stacked.next(0)


@pytest.mark.parametrize(
    ("threads", "parallel", "expected"),
    [("1", 2, OneByOne), ("2", 1, OneByOne), ("2", 2, Workers)],
)
def test_lanes_are_processes_where_there_are_threads_for_them(
    parts: Parts,
    monkeypatch: pytest.MonkeyPatch,
    threads: str,
    parallel: int,
    expected: type,
) -> None:
    settings, paths, prepared, backbone = parts
    monkeypatch.setattr(lanes_module, "chosen_threads", lambda: int(threads))
    search = settings.search.model_copy(update={"parallel": parallel})
    asked = TaskSettings(**{**vars(settings), "search": search})
    with open_lanes(asked, paths, prepared, backbone) as lanes:
        assert type(lanes) is expected
        if isinstance(lanes, Workers):
            assert len(lanes._processes) == 2


@pytest.mark.slow
def test_lanes_of_a_study_change_neither_draws_nor_scores(
    parts: Parts, workers: Workers, tmp_path: Path
) -> None:
    settings, _, prepared, backbone = parts

    def scores(changes: Any) -> Iterator[float]:
        return lanes_module._scores(settings, prepared, backbone, None, None, changes)

    def run(name: str, lanes: Lanes) -> tuple[Outcome, list[Any]]:
        study = Study(database=tmp_path / f"{name}.db", name="study", search=settings.search)
        outcome = study.run(lanes, lambda trial, done: None)
        return outcome, [(t.state, t.value, t.params) for t in study.finished()]

    one_by_one = run("turns", OneByOne(scores))
    assert sum(one_by_one[0].counts.values()) == 5
    assert run("processes", workers) == one_by_one
    assert run("stack", Stacked(settings, prepared, backbone, None)) == one_by_one


def test_lanes_of_a_study_draw_different_trials(tmp_path: Path) -> None:
    search = SearchSettings.model_validate({"n_trials": 6, "epochs": 1, "parallel": 3})
    study = Study(database=tmp_path / "study.db", name="study", search=search)
    asked: list[Any] = []

    def scores(changes: Any) -> Iterator[float]:
        asked.append(changes)
        return iter([0.5])

    outcome = study.run(OneByOne(scores), lambda trial, done: None)
    assert outcome.counts == {"complete": 6, "pruned": 0, "failed": 0}
    assert len({str(changes) for changes in asked}) == 6


def test_search_screen_begins_the_search_and_tells_how_well_it_ranked(
    parts: Parts, tmp_path: Path
) -> None:
    root = make_workspace(tmp_path / "space")
    change_params(
        root,
        {
            "search.n_trials": 5,
            "search.parallel": 1,
            "search.screen": {"layers": 1, "n_trials": 4, "keep": 3},
        },
    )
    before = Path.cwd()
    for stage in ("fetch", "prepare", "search"):
        assert call(stage, "-t", "intents", "-C", str(root)) == 0
    os.chdir(before)
    best = json.loads((root / "results" / "intents" / "search" / "best.json").read_text())
    assert best["screen"]["layers"] == 1
    assert sum(best["screen"]["n_trials"].values()) == 4
    # the baseline is tried in both, and the best three of the screen are
    assert best["screen"]["compared"] >= 3
    assert sum(best["n_trials"].values()) == 5
    trunk = list((root / ".ptv2" / "trunk").glob("*.npy"))
    assert len(trunk) == 2  # train and dev, below layer 2


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(0.1, 0.2), (0.2, 0.3)], None),
        ([(0.1, 0.2), (0.1, 0.3), (0.1, 0.4)], None),
        ([(0.1, 0.7), (0.2, 0.8), (0.3, 0.9)], 1.0),
        ([(0.1, 0.9), (0.2, 0.8), (0.3, 0.7)], -1.0),
        # ranks 1, 2, 3, 4 against 2, 1, 4, 3: 1 - 6 * 4 / (4 * 15)
        ([(1.0, 2.0), (2.0, 1.0), (3.0, 4.0), (4.0, 3.0)], 0.6),
    ],
)
def test_search_rank_correlation_is_spearmans(pairs: Any, expected: float | None) -> None:
    found = rank_correlation(pairs)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_search_screen_compares_settings_that_ended_both_ways_once_each() -> None:
    def trial(number: int, state: str, value: float, **params: Any) -> Trial:
        return Trial(number=number, state=state, value=value, params=params)

    screened = [
        trial(0, "complete", 0.9, prompt_length=4, reparameterization="mlp"),
        trial(1, "complete", 0.9, prompt_length=4, reparameterization="mlp"),
        trial(2, "complete", 0.8, prompt_length=8, reparameterization="mlp"),
        trial(3, "complete", 0.7, prompt_length=9, reparameterization="mlp"),
        trial(4, "complete", 0.6, prompt_length=9, reparameterization="embedding"),
    ]
    full = [
        trial(0, "complete", 0.5, reparameterization="mlp", prompt_length=4),
        trial(1, "complete", 0.6, reparameterization="mlp", prompt_length=8),
        trial(2, "complete", 0.6, reparameterization="mlp", prompt_length=8),
        trial(3, "pruned", 0.1, reparameterization="mlp", prompt_length=9),
        trial(4, "complete", 0.7, reparameterization="embedding", prompt_length=9),
    ]
    counts = {"complete": 5, "pruned": 0, "failed": 0}
    screen = Screen(layers=1, keep=2, counts=counts, trials=screened)
    found = screen.agreement(full)
    assert (found.compared, found.rank_correlation) == (3, pytest.approx(-1.0))


def test_lanes_in_one_forward_refuse_draws_that_neighbours_would_share(parts: Parts) -> None:
    settings, _, prepared, backbone = parts
    stacked = Stacked(settings, prepared, backbone, None)
    with pytest.raises(ConfigError, match=r"train\.backbone_dropout: .* expected false"):
        stacked.start(0, {"backbone_dropout": True})
