"""What the learning-rate windows of a comparison say, on numbers that can be checked by hand."""

import pytest

from pipelines.compare_stats import summarise
from pipelines.compare_windows import summarise_windows
from tests.pipelines.compare_parts import PLAIN, comparison, row, window, window_runs

RATES = (1e-3, 1e-2, 1e-1)


def made(runs, methods=("probe", "ptv2"), **changes):
    rows = [row(task, method, hits=7) for task in ("rte", "cb") for method in methods]
    return comparison(rows, variants=(PLAIN,), window=window(runs, **changes))


def windows_of(found):
    return summarise_windows(found, summarise(found, resamples=10))


def test_compare_windows_are_of_the_mean_over_seeds():
    runs = [
        *window_runs(seed=1, rates=RATES, scores=(0.9, 0.9, None)),
        *window_runs(seed=2, rates=RATES, scores=(0.7, 0.9, 0.6)),
    ]
    (cell,) = windows_of(made(runs)).cells
    assert (cell.task, cell.method, cell.rates) == ("rte", "ptv2", RATES)
    assert cell.scores == pytest.approx((0.8, 0.9, 0.3))
    assert cell.diverged == (0, 0, 1)
    assert (cell.best, cell.best_rate) == (pytest.approx(0.9), 1e-2)
    # a tenth of the left half and a sixtieth of the right one
    assert cell.share == pytest.approx(0.5 / 10 + 0.5 / 60)
    # the probe has 0.7: all of the left half, a third of the right one
    assert cell.probe_share == pytest.approx(0.5 + 0.5 / 3)


def test_compare_windows_are_averaged_over_tasks():
    runs = [
        *window_runs("rte", "ptv2", rates=RATES, scores=(0.9, 0.9, 0.9)),
        *window_runs("rte", "plain", rates=RATES, scores=(0.5, 0.6, 0.5)),
        *window_runs("cb", "ptv2", rates=RATES, scores=(0.6, 0.8, 0.6)),
        *window_runs("cb", "plain", rates=RATES, scores=(0.8, 0.8, 0.8)),
    ]
    found = windows_of(made(runs))
    assert [(cell.task, cell.method) for cell in found.cells] == [
        ("rte", "ptv2"),
        ("rte", "plain"),
        ("cb", "ptv2"),
        ("cb", "plain"),
    ]
    ours, plain = found.averages
    assert (ours.method, plain.method) == ("ptv2", "plain")
    assert ours.best == pytest.approx(0.85)
    assert ours.share == pytest.approx((1 + 0.05) / 2)
    assert ours.probe_share == pytest.approx((1 + 0.5) / 2)
    assert plain.share == pytest.approx((0.1 + 1) / 2)
    assert plain.probe_share == pytest.approx((0 + 1) / 2)


def test_compare_windows_need_no_probe():
    runs = window_runs(rates=RATES, scores=(0.9, 0.9, 0.9))
    found = windows_of(made(runs, methods=("ptv2",)))
    assert found.cells[0].probe_share is None
    assert found.averages[0].probe_share is None
    assert windows_of(comparison([row()])) is None
