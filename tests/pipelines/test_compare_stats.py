import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from pipelines.compare_data import Items
from pipelines.compare_stats import (
    bootstrap,
    interval,
    mean_sd,
    score,
    share_at_least,
    summarise,
    window,
)
from pipelines.errors import PipelineError
from tests.pipelines.compare_parts import comparison, mean_items, row

F1 = Items(kind="f1", values=[[1, 1, 2], [0, 1, 1], [2, 2, 2]])
PEARSON = Items(kind="pearson", values=[[1, 2], [2, 1], [3, 5], [4, 3]])


def test_mean_sd_is_that_of_a_sample():
    assert mean_sd([0.8, 0.9, 0.7]) == pytest.approx((0.8, 0.1))
    assert mean_sd([0.8]) == (0.8, None)


def test_score_of_each_kind_by_hand():
    assert score(mean_items(3, 4)) == 0.75
    # 2 * (1 + 0 + 2) / ((1 + 1 + 2) + (2 + 1 + 2))
    assert score(F1) == pytest.approx(6 / 9)
    assert score(F1, [1, 1]) == 0.0
    assert score(F1, [0, 0, 1]) == pytest.approx(4 / 8)
    values = np.array(PEARSON.values)
    assert score(PEARSON) == pytest.approx(np.corrcoef(values.T)[0, 1])
    drawn = [0, 0, 3, 1]
    assert score(PEARSON, drawn) == pytest.approx(np.corrcoef(values[drawn].T)[0, 1])


def test_score_that_is_not_defined_is_zero():
    assert score(PEARSON, [2, 2, 2]) == 0.0
    assert score(Items(kind="f1", values=[[0, 0, 0]])) == 0.0
    assert score(Items(kind="pearson", values=[[1, 1], [1, 2]])) == 0.0


@pytest.mark.parametrize("values", [[], [[1.0]], [[1.0, 2.0, 3.0], [1.0]]])
def test_items_of_the_wrong_shape_are_refused(values):
    with pytest.raises(PipelineError, match=r"expected .* \[correct, predicted, gold\]"):
        Items(kind="f1", values=values)


@pytest.mark.parametrize("items", [mean_items(2, 3), F1], ids=["mean", "f1"])
def test_bootstrap_has_the_distribution_of_all_resamples(items):
    # three items have 27 equally likely resamples: all of them are the oracle
    exact = [score(items, index) for index in itertools.product(range(3), repeat=3)]
    drawn = bootstrap({"a": [items]}, resamples=20_000, seed=1)["a"]
    assert set(np.round(drawn, 9)) == set(np.round(exact, 9))
    for value in set(exact):
        expected = np.mean(np.isclose(exact, value))
        assert np.mean(np.isclose(drawn, value)) == pytest.approx(expected, abs=0.015)


def test_bootstrap_of_a_correlation_agrees_with_scipy():
    generator = np.random.default_rng(0)
    gold = generator.normal(size=60)
    predicted = gold + generator.normal(size=60) + 100
    items = Items(kind="pearson", values=np.stack([predicted, gold], axis=1).tolist())
    low, high, _ = interval(bootstrap({"a": [items]}, resamples=5000, seed=0)["a"])
    oracle = stats.bootstrap(
        (predicted, gold),
        lambda x, y: stats.pearsonr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=0.03)


def test_bootstrap_of_a_difference_of_means_agrees_with_scipy():
    generator = np.random.default_rng(0)
    ours, theirs = (generator.random((2, 200)) < [[0.8], [0.7]]).astype(float)
    groups = {
        "a": [Items(kind="mean", values=ours[:, None].tolist())],
        "b": [Items(kind="mean", values=theirs[:, None].tolist())],
    }
    drawn = bootstrap(groups, resamples=10_000, seed=0)
    low, high, _ = interval(drawn["a"] - drawn["b"])
    oracle = stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=0.01)


def test_bootstrap_is_paired_and_averages_over_seeds():
    # what one seed gains on an item the other loses: the mean over seeds does not vary at all
    right = Items(kind="mean", values=[[1], [0], [1], [0]])
    wrong = Items(kind="mean", values=[[0], [1], [0], [1]])
    drawn = bootstrap({"a": [right, wrong], "b": [right]}, resamples=50, seed=3)
    assert drawn["a"] == pytest.approx(0.5)
    assert drawn["b"].std() > 0.1
    # the same draws for both methods: a method has no difference to itself
    same = bootstrap({"a": [right], "b": [right]}, resamples=50, seed=3)
    assert (same["a"] == same["b"]).all()
    assert (same["a"] == drawn["b"]).all()


def test_bootstrap_draws_the_same_whatever_the_chunks(monkeypatch):
    groups = {"a": [mean_items(30, 50)]}
    whole = bootstrap(groups, resamples=100, seed=5)["a"]
    monkeypatch.setattr("pipelines.compare_stats.CHUNK_VALUES", 1)
    assert (bootstrap(groups, resamples=100, seed=5)["a"] == whole).all()


def test_bootstrap_of_different_test_items_is_refused():
    with pytest.raises(PipelineError, match=r"bootstrap of a, b: .* got \[3, 4\] items"):
        bootstrap({"a": [mean_items(1, 3)], "b": [mean_items(1, 4)]}, resamples=10, seed=0)


def test_bootstrap_of_a_large_split_takes_seconds():
    hits = np.random.default_rng(0).random((6, 10_570, 1)).tolist()
    groups = {
        name: [Items(kind="mean", values=values) for values in hits[place : place + 3]]
        for name, place in (("a", 0), ("b", 3))
    }
    began = time.perf_counter()
    bootstrap(groups, resamples=1000, seed=0)
    assert time.perf_counter() - began < 5


def test_interval_by_hand():
    low, high, p_value = interval(np.arange(-10.0, 91.0))
    assert (low, high) == pytest.approx((-7.5, 87.5))
    # 11 of 101 resamples are at or below 0
    assert p_value == pytest.approx(2 * 12 / 102)


def test_interval_without_any_difference_and_with_a_certain_one():
    assert interval(np.zeros(99)) == (0.0, 0.0, 1.0)
    assert interval(np.ones(99)) == (1.0, 1.0, 0.02)


def test_summary_averages_only_tasks_that_all_methods_finished():
    rows = [
        row("rte", "ptv2", 0, hits=8),
        row("rte", "ptv2", 1, hits=6),
        row("rte", "finetune", 0, hits=9),
        row("rte", "finetune", 1, hits=9),
        row("copa", "ptv2", 0, hits=2),
        row("copa", "ptv2", 1, hits=4),
        row("copa", "finetune", 0, hits=5),
        row("copa", "finetune", 1, hits=5),
        row("cb", "ptv2", 0, hits=10),
        row("cb", "ptv2", 1, hits=10),
        row("cb", "finetune", 1, hits=10),
    ]
    summary = summarise(comparison(rows), resamples=200)
    assert summary.complete_tasks == ("rte", "copa")
    assert summary.missing == (("cb", "finetune", (0,)),)
    assert [(one.method, one.test) for one in summary.averages] == [
        ("ptv2", pytest.approx(0.5)),
        ("finetune", pytest.approx(0.7)),
    ]
    # of ptv2, (0.8 + 0.2) / 2 with seed 0 and (0.6 + 0.4) / 2 with seed 1
    assert summary.averages[0].test_sd == pytest.approx(0.0)
    cell = summary.cell("rte", "ptv2")
    assert (cell.test, cell.test_sd) == pytest.approx((0.7, 0.2 / 2**0.5))
    assert summary.cell("cb", "finetune").test_sd is None
    assert summary.cell("cb", "probe") is None
    assert summary.difference("rte", "finetune").value == pytest.approx(-0.2)
    assert summary.difference(None, "finetune").value == pytest.approx(-0.2)


def test_summary_marks_a_difference_only_where_the_interval_excludes_zero():
    rows = [
        row("rte", "probe", hits=20, size=100),
        row("rte", "ptv2", hits=80, size=100),
        row("rte", "finetune", hits=81, size=100),
    ]
    summary = summarise(comparison(rows), resamples=1000)
    clear, unclear = summary.difference("rte", "probe"), summary.difference("rte", "finetune")
    assert clear.is_clear
    assert clear.low > 0
    assert clear.p_value < 0.05
    assert not unclear.is_clear
    assert unclear.high == 0.0
    # the one item that differs is left out of 100 draws by chance: (1 - 1/100)^100
    assert unclear.p_value == pytest.approx(2 * 0.99**100, abs=0.08)


def test_summary_of_a_task_does_not_depend_on_the_other_tasks():
    alone = [row("rte", "ptv2", hits=7), row("rte", "finetune", hits=8)]
    others = [row("copa", "ptv2", hits=2), row("copa", "finetune", hits=5)]
    one = summarise(comparison(alone)).difference("rte", "finetune")
    assert summarise(comparison([*others, *alone])).difference("rte", "finetune") == one
    assert summarise(comparison(alone)).difference("rte", "finetune") == one


def test_summary_without_test_items_has_differences_without_intervals():
    rows = [row(method="ptv2", hits=8, items=None), row(method="finetune", hits=6)]
    difference = summarise(comparison(rows)).difference("rte", "finetune")
    assert difference.value == pytest.approx(0.2)
    assert (difference.low, difference.high, difference.p_value) == (None, None, None)
    assert not difference.is_clear


def test_summary_refuses_items_that_do_not_give_the_test_score():
    rows = [row(method="ptv2", hits=8, test=0.9)]
    with pytest.raises(
        PipelineError, match=r"rte, ptv2, seed 0: .* accuracy 0.9000, got 0.8000 from them"
    ):
        summarise(comparison(rows))


def test_summary_without_any_run_says_what_is_missing():
    planned = comparison([], methods=("ptv2", "finetune"), seeds=(0,), tasks=())
    assert summarise(planned).averages == ()


def test_summary_tells_luck_by_the_spread_over_seeds_and_the_worst_of_them():
    rows = [
        row("rte", "ptv2", 0, hits=8),
        row("rte", "ptv2", 1, hits=6),
        row("copa", "ptv2", 0, hits=3),
        row("copa", "ptv2", 1, hits=4),
    ]
    (average,) = summarise(comparison(rows), resamples=10).averages
    # sds of (0.8, 0.6) and (0.3, 0.4); averages 0.55 with seed 0 and 0.5 with seed 1
    assert average.spread == pytest.approx((0.2 / 2**0.5 + 0.1 / 2**0.5) / 2)
    assert average.worst == pytest.approx(0.5)
    (single,) = summarise(comparison([row(hits=8)]), resamples=10).averages
    assert (single.spread, single.worst) == (None, 0.8)


RATES = (1e-3, 1e-2, 1e-1)


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ((0.9, 0.9, 0.9), 1.0),
        # the level 0.89 is reached a tenth of the way down, on either side of the middle
        ((0.8, 0.9, 0.8), 0.1),
        # the best at an edge, and falling by 0.02 over the first half
        ((0.9, 0.88, 0.5), 0.25),
        ((0.5, 0.88, 0.9), 0.25),
        # two separate intervals: a tenth of the left half, a fifth of the right one
        ((0.9, 0.8, 0.85), 0.05),
        ((0.9, 0.8, 0.9), 0.1),
        # exactly a point below still counts, though 0.9 - 0.01 is a little more than 0.89
        ((0.89, 0.9, 0.89), 1.0),
        ((0.0, 0.0, 0.0), 1.0),
        # a training that diverged counts as 0
        ((0.9, 0.9, 0.0), 0.5 + 0.5 / 90),
    ],
)
def test_window_by_hand(scores, share):
    assert window(RATES, scores) == pytest.approx(share, abs=1e-7)


def test_window_of_uneven_rates_goes_by_their_logarithms():
    # from 1 to 2 all, from 2 to 16 a quarter of three doublings
    assert window((1, 2, 16), (0.9, 0.9, 0.86)) == pytest.approx((1 + 3 / 4) / 4)
    assert window((1, 2, 16), (0.9, 0.9, 0.86), tolerance=0.02) == pytest.approx((1 + 3 / 2) / 4)


def test_window_agrees_with_counting_on_a_fine_grid():
    generator = np.random.default_rng(0)
    for _ in range(20):
        rates = np.exp(np.sort(generator.uniform(-9, 0, size=6)))
        scores = generator.uniform(0.85, 0.9, size=6)
        places = np.linspace(math.log(rates[0]), math.log(rates[-1]), 200_001)
        near = np.interp(places, np.log(rates), scores) >= scores.max() - 0.01
        assert window(rates, scores) == pytest.approx(near.mean(), abs=1e-4)


def test_share_at_least_may_be_nothing_or_a_touch():
    assert share_at_least(RATES, (0.5, 0.6, 0.5), 0.7) == 0.0
    assert share_at_least(RATES, (0.5, 0.6, 0.5), 0.6) == pytest.approx(0.0, abs=1e-7)
    assert share_at_least(RATES, (0.5, 0.6, 0.5), 0.55) == pytest.approx(0.5)
