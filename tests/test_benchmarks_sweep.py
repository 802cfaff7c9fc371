"""The arithmetic of `python -m benchmarks.sweep`; nothing here depends on how long it takes."""

import json
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.data import data_folder
from benchmarks.epochs import Ratio, best, overall, ratio, spent, spent_until
from benchmarks.sweep import Found, main, mapping, plans
from benchmarks.sweep_overhead import Overhead, seconds_each
from benchmarks.sweep_report import drawn
from benchmarks.sweep_ways import OURS, TPE, Curves, Plan, make_workspace, params_file
from pipelines.settings import load_settings

OVERHEADS = [
    Overhead(
        engine="processes",
        workers=workers,
        trials=4,
        trials_per_minute=60,
        training_ms=900,
        overhead_ms=100 * workers,
    )
    for workers in (1, 2)
]
GRID = [[0.1, 0.2, 0.2], [0.3, 0.6, 0.5], [0.4, 0.6, 0.5]]


def test_epochs_count_up_to_the_first_that_reaches_the_score() -> None:
    assert best(GRID) == 0.6
    assert spent(GRID) == 9
    assert spent_until(GRID, 0.6) == 5
    assert spent_until(GRID, 0.3) == 4
    assert spent_until(GRID, 0.05) == 1
    assert spent_until(GRID, 0.61) is None
    assert spent_until([], 0.0) is None


def test_epochs_of_trials_given_up_count_as_far_as_they_went() -> None:
    assert spent_until([[0.1], [], [0.2, 0.3], [0.9]], 0.9) == 4


def test_epochs_until_a_score_forgive_the_rounding_of_a_difference() -> None:
    assert 0.6 - 0.005 > 0.595 - 1e-12
    assert spent_until([[0.1, 0.595]], 0.6 - 0.005) == 2


def test_ratio_is_that_of_the_medians_over_the_seeds() -> None:
    ours = [[[0.6]], [[0.1, 0.7]], [[0.1, 0.1, 0.1], [0.6]]]
    found = ratio([GRID] * 3, ours, [0.6] * 3)
    assert found == Ratio(value=5 / 2, is_bound=False, peer=(5, 5, 5), ours=(1, 2, 4))


def test_ratio_counts_all_epochs_of_a_peer_that_never_got_there() -> None:
    found = ratio([[[0.1, 0.2], [0.3, 0.3]]], [[[0.5]]], [0.5])
    assert found == Ratio(value=4.0, is_bound=True, peer=(4,), ours=(1,))


def test_ratio_is_none_where_ours_never_gets_there_with_some_seed() -> None:
    found = ratio([GRID] * 2, [[[0.6]], [[0.5, 0.5]]], [0.6, 0.6])
    assert found == Ratio(value=None, is_bound=False, peer=(5, 5), ours=(1, None))


def test_overall_is_the_geometric_mean_and_none_where_a_task_failed() -> None:
    two, eight = (ratio([[[0.0] * (n - 1) + [1.0]]], [[[1.0]]], [1.0]) for n in (2, 8))
    assert overall([two, eight]) == 4.0
    assert overall([two, ratio([GRID], [[[0.0]]], [0.6])]) is None
    assert overall([]) is None


@pytest.mark.parametrize(("workers", "expected"), [(1, 2.0), (2, 4.0)])
def test_seconds_of_a_trial_begin_when_each_worker_has_ended_one(
    workers: int, expected: float
) -> None:
    begun = datetime(2026, 1, 1)
    ends = [begun + timedelta(seconds=seconds) for seconds in (50, 52, 54, 56)]
    # with two workers 4 s for two trials, which each took one of them 4 s
    assert seconds_each(ends[::-1], workers) == (expected, 4 - workers)


def test_figures_have_the_ratios_of_all_tasks_and_are_drawn() -> None:
    plan = plans(quick=True)[0]
    ours, tpe = [[0.1, 0.6]], [[0.1, 0.1, 0.1, 0.1], [0.2, 0.595, 0.1, 0.1]]
    others = {TPE: [tpe], OURS: [ours]}
    found = Found(plan=plan, dev_rows=250, grid=GRID, others=others, trained=19)
    figures = json.loads(json.dumps(mapping([found], OVERHEADS)))
    assert figures["ratios"] == {
        "epochs_vs_grid": 2.5,
        "epochs_vs_tpe": 3.0,
        "half_point_below_vs_grid": 2.5,
        "grids_best_vs_tpe": 4.0,
    }
    assert figures["overhead_ms_per_trial"] == 200
    task = figures["tasks"][0]
    assert task["ways"]["grid"][0]["epochs"] == 9
    assert task["ratios"]["best"]["tpe"]["is_bound"]
    assert task["ways"]["tpe"][0]["epochs_until"] == {
        "best": None,
        "half_point_below": 6,
        "tpe_best": 6,
    }
    file = StringIO()
    Console(width=120, file=file).print(drawn(figures))
    text = file.getvalue()
    assert "never" in text
    assert ">4.0" in text


@pytest.mark.parametrize("quick", [True, False])
def test_grid_has_the_rates_and_lengths_of_the_released_script(quick: bool) -> None:
    for plan in plans(quick=quick):
        assert plan.rates == (5e-3, 7e-3, 1e-2)
        assert plan.lengths == (4, 8, 16, 32, 64, 128)


def _found(plan: Plan, grid: Curves, dev_rows: int) -> Found:
    others = {TPE: [[[0.1, 0.9]]], OURS: [[[0.9]]]}
    return Found(plan=plan, dev_rows=dev_rows, grid=grid, others=others, trained=1)


@pytest.mark.parametrize(
    ("top", "dev_rows", "is_learned"),
    # three standard errors of a coin tossed 100 times are 0.15, 10,000 times 0.015
    [(0.64, 100, False), (0.66, 100, True), (0.51, 10_000, False), (0.52, 10_000, True)],
)
def test_a_score_that_guessing_reaches_is_in_no_ratio(
    top: float, dev_rows: int, is_learned: bool
) -> None:
    slots, rte = plans(quick=True)
    guessed = _found(rte, [[0.5, top]], dev_rows)
    learned = _found(slots, [[0.0, 0.01]], dev_rows)
    assert guessed.is_learned is is_learned
    assert learned.is_learned
    figures = mapping([learned, guessed], OVERHEADS)
    assert figures["tasks_in_ratios"] == ["slots", "rte"][: 1 + is_learned]
    assert figures["ratios"]["epochs_vs_grid"] == 2.0
    assert [one["is_learned"] for one in figures["tasks"]] == [True, is_learned]
    assert mapping([guessed], OVERHEADS)["ratios"]["epochs_vs_grid"] == (
        2.0 if is_learned else None
    )


@pytest.mark.bench_data
@pytest.mark.parametrize("quick", [True, False])
def test_workspace_of_a_search_has_settings_that_are_accepted(quick: bool, tmp_path: Path) -> None:
    plan = plans(quick=quick)[1]
    root = tmp_path / "space"
    make_workspace(root, data_folder().resolve(), plan)
    settings = load_settings(params_file(root, OURS, plan.seeds[0])).task(plan.task)
    assert settings.search.epochs == plan.epochs
    rows = (root / "data" / "raw" / plan.task / "train.jsonl").read_text(encoding="utf-8")
    assert len(rows.splitlines()) == 2490


def test_command_without_the_data_says_so_and_gives_the_overhead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PTV2_BENCH_DATA", str(tmp_path / "none"))
    monkeypatch.setattr(
        "benchmarks.sweep_overhead.measure",
        lambda scratch, *, engine, workers, trials: OVERHEADS[:1] if trials == 40 else [],
    )
    main(["--quick", "--json", str(tmp_path / "figures.json")])
    assert "no epochs are counted: rte, snips not found" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["ratios"]["epochs_vs_grid"] is None
    assert figures["tasks"] == []
    assert figures["overhead_ms_per_trial"] == 100
