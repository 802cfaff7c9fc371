"""Numbers of a comparison: spread over seeds, averages, paired bootstrap, windows. Pure numpy.

Letters: R resamples, I test items, F features of an item.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from pipelines.compare_data import Comparison, FloatArray, ItemKind, Items, Row
from pipelines.errors import PipelineError

RESAMPLES = 5000
CHUNK_VALUES = 1 << 20
"""Counts drawn at once, [resamples, items]; 8 MiB, whatever the size of a test split."""
SCORE_TOLERANCE = 1e-3
WINDOW_TOLERANCE = 0.01
"""How far below the best score a window reaches."""
ROUNDING = 1e-9
"""Scores this close count as equal: 0.9 - 0.01 is not quite 0.89."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task and method over its seeds.

    Attributes:
        task: The task.
        method: The method.
        metric: What is scored.
        seeds: Those that finished.
        dev: Mean dev score.
        dev_sd: Sample standard deviation over seeds; none for a single one.
        test: Mean test score.
        test_sd: Likewise.
        tuned_share: Mean.
        tuned_parameters: Mean, rounded.
        artifact_bytes: Mean, rounded.
        seconds: Mean.
        peak_memory_bytes: Highest; none where none was measured.
    """

    task: str
    method: str
    metric: str
    seeds: tuple[int, ...]
    dev: float
    dev_sd: float | None
    test: float
    test_sd: float | None
    tuned_share: float
    tuned_parameters: int
    artifact_bytes: int
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Average:
    """One method over the tasks that all methods finished.

    Attributes:
        method: The method.
        test: Mean over tasks of the mean over seeds.
        test_sd: Sample standard deviation, over seeds, of the mean over tasks; none for one seed.
        spread: Mean over tasks of the sample standard deviation over seeds; none for one seed.
        worst: Lowest over seeds of the mean over tasks; none in a file of an older version.
    """

    method: str
    test: float
    test_sd: float | None
    spread: float | None = None
    worst: float | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Test score of one method less that of another.

    Attributes:
        task: The task; none for the average over tasks.
        method: The first.
        other: What is taken off.
        value: Difference of the means over seeds.
        low: Where the 95 % interval begins; none where test items were not kept.
        high: Where it ends.
        p_value: Two-sided, that there is no difference.
    """

    task: str | None
    method: str
    other: str
    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the rows of a comparison say.

    Attributes:
        cells: By task and method; those without a run are left out.
        complete_tasks: Those that all methods finished for all seeds: what averages are over.
        missing: `(task, method, seeds)` that have not finished.
        averages: A method each; empty without a complete task.
        differences: Of the comparison's subject and each other method, for each task.
        average_differences: Likewise, over the complete tasks.
        resamples: R.
        seed: Of the resamples.
    """

    cells: tuple[Cell, ...]
    complete_tasks: tuple[str, ...]
    missing: tuple[tuple[str, str, tuple[int, ...]], ...]
    averages: tuple[Average, ...]
    differences: tuple[Difference, ...]
    average_differences: tuple[Difference, ...]
    resamples: int
    seed: int

    def cell(self, task: str, method: str) -> Cell | None:
        """Return the cell of a task and method, if it has a run."""
        return next((one for one in self.cells if (one.task, one.method) == (task, method)), None)

    def difference(self, task: str | None, other: str) -> Difference | None:
        """Return the difference to another method, for a task or (none) the average."""
        found = self.average_differences if task is None else self.differences
        return next((one for one in found if (one.task, one.other) == (task, other)), None)


def mean_sd(scores: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation (n - 1); none for a single score."""
    return fmean(scores), stdev(scores) if len(scores) > 1 else None


def score(items: Items, index: Sequence[int] | None = None) -> float:
    """Return the score of the items, or of a resample of them; an undefined one is 0.

    Args:
        items: A test split's.
        index: Places of items, with repetition; none takes each once.
    """
    features = items.features if index is None else items.features[np.asarray(index)]
    return float(_scores(features.sum(axis=0), len(features), items.kind))


def bootstrap(
    groups: Mapping[str, Sequence[Items]], *, resamples: int, seed: int | Sequence[int]
) -> dict[str, FloatArray]:
    """Return `[R]` scores of each group on the same resamples of the test items.

    A group is a method, its members are its seeds: the score of a resample is their mean. What
    varies is the test split; the seeds are held as they are.

    Raises:
        PipelineError: The members do not have the same test items.
    """
    members = [(name, items) for name, group in groups.items() for items in group]
    sizes = {len(items.values) for _, items in members}
    kinds = {items.kind for _, items in members}
    if len(sizes) != 1 or len(kinds) != 1:
        raise PipelineError(
            f"bootstrap of {', '.join(groups)}: expected the same test items for all, got "
            f"{sorted(sizes)} items of kind {', '.join(sorted(kinds))}"
        )
    (size,), (kind,) = sizes, kinds
    features = np.concatenate([items.features for _, items in members], axis=1)  # [I, M * F]
    parts = []
    for counts in _resampled_counts(size, resamples, np.random.default_rng(seed)):
        sums = (counts @ features).reshape(len(counts), len(members), -1)  # [chunk, M, F]
        parts.append(_scores(sums, size, kind))
    scores = np.concatenate(parts)  # [R, M]
    return {
        name: scores[:, [place for place, (owner, _) in enumerate(members) if owner == name]].mean(
            axis=1
        )
        for name in groups
    }


def interval(differences: FloatArray) -> tuple[float, float, float]:
    """Return the ends of the 95 % percentile interval, and the two-sided p-value of no difference.

    The p-value is twice the smaller share of resamples on one side of 0; it is never 0, since so
    few resamples cannot show that.
    """
    low, high = np.quantile(differences, [0.025, 0.975])
    # a difference of equal counts is not exactly 0 after a matrix product
    side = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())
    p_value = min(1.0, 2.0 * (side + 1) / (len(differences) + 1))
    return float(low), float(high), float(p_value)


def share_at_least(rates: Sequence[float], scores: Sequence[float], level: float) -> float:
    """Return the share of a range of rates, in logs, in which the score is at least `level`.

    Between two rates the score is a straight line over the logarithm of the rate.

    Args:
        rates: Two or more above 0, lowest first.
        scores: One a rate.
        level: The score.
    """
    places = np.log(np.asarray(rates, dtype=np.float64))
    above = np.asarray(scores, dtype=np.float64) - level + ROUNDING
    assert len(places) == len(above) > 1, "a range has two ends, and a score at each rate"
    widths = np.diff(places)
    assert (widths > 0).all(), "rates are in their order"
    low, high = np.minimum(above[:-1], above[1:]), np.maximum(above[:-1], above[1:])
    # of a line that crosses the level, the part above it
    crossing = np.divide(high, high - low, out=np.zeros_like(high), where=high > low)
    inside = np.where(low >= 0, 1.0, np.where(high < 0, 0.0, crossing))
    return float((inside * widths).sum() / widths.sum())


def window(
    rates: Sequence[float], scores: Sequence[float], tolerance: float = WINDOW_TOLERANCE
) -> float:
    """Return the share of a range of rates, in logs, in which the score is near its best.

    Several separate intervals count together.

    Args:
        rates: Two or more above 0, lowest first.
        scores: One a rate, 0 to 1.
        tolerance: How far below the best of them still is near.
    """
    return share_at_least(rates, scores, max(scores) - tolerance)


def summarise(comparison: Comparison, *, resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Compute all that tables and plots show.

    Args:
        comparison: The finished runs.
        resamples: R of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        PipelineError: Items of a run do not belong to its score, or to those of another run.
    """
    names = [task.name for task in comparison.tasks]
    missing = tuple(_missing(comparison))
    unfinished = {task for task, _, _ in missing}
    complete = [name for name in names if name not in unfinished]
    draws = {name: _draws(comparison, name, resamples, seed) for name in names}
    return Summary(
        cells=tuple(
            _cell(runs)
            for name in names
            for method in comparison.methods
            if (runs := comparison.runs(name, method))
        ),
        complete_tasks=tuple(complete),
        missing=missing,
        averages=tuple(_averages(comparison, complete)),
        differences=tuple(
            difference
            for name in names
            for difference in _differences(comparison, name, [name], draws)
        ),
        average_differences=tuple(_differences(comparison, None, complete, draws)),
        resamples=resamples,
        seed=seed,
    )


def _scores(sums: FloatArray, size: int, kind: ItemKind) -> FloatArray:
    """`[..., F]` sums over `size` items -> `[...]` scores."""
    if kind == "mean":
        return np.asarray(sums[..., 0] / size)
    if kind == "f1":
        correct, total = sums[..., 0], sums[..., 1] + sums[..., 2]
        return np.divide(2 * correct, total, out=np.zeros_like(correct), where=total > 0)
    x, y, xx, yy, xy = np.moveaxis(sums / size, -1, 0)
    variances = (xx - x * x) * (yy - y * y)
    is_defined = variances > 1e-12
    root = np.sqrt(np.where(is_defined, variances, 1.0))
    return np.where(is_defined, (xy - x * y) / root, 0.0)


def _resampled_counts(
    size: int, resamples: int, generator: np.random.Generator
) -> Iterator[FloatArray]:
    """Yield `[chunk, I]`: how often each resample of I items holds each of them."""
    chunk = max(1, CHUNK_VALUES // size)
    for begin in range(0, resamples, chunk):
        rows = min(chunk, resamples - begin)
        drawn = generator.integers(size, size=(rows, size))
        drawn += np.arange(rows)[:, None] * size
        counts = np.bincount(drawn.ravel(), minlength=rows * size)
        yield counts.reshape(rows, size).astype(np.float64)


def _missing(comparison: Comparison) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for task in comparison.tasks:
        for method in comparison.methods:
            done = {row.seed for row in comparison.runs(task.name, method)}
            if lacking := tuple(seed for seed in comparison.seeds if seed not in done):
                yield task.name, method, lacking


def _cell(runs: Sequence[Row]) -> Cell:
    dev, dev_sd = mean_sd([row.dev for row in runs])
    test, test_sd = mean_sd([row.test for row in runs])
    peaks = [row.peak_memory_bytes for row in runs if row.peak_memory_bytes is not None]
    return Cell(
        task=runs[0].task,
        method=runs[0].method,
        metric=runs[0].metric,
        seeds=tuple(row.seed for row in runs),
        dev=dev,
        dev_sd=dev_sd,
        test=test,
        test_sd=test_sd,
        tuned_share=fmean(row.tuned_share for row in runs),
        tuned_parameters=round(fmean(row.tuned_parameters for row in runs)),
        artifact_bytes=round(fmean(row.artifact_bytes for row in runs)),
        seconds=fmean(row.seconds for row in runs),
        peak_memory_bytes=max(peaks, default=None),
    )


def _averages(comparison: Comparison, complete: Sequence[str]) -> Iterator[Average]:
    if not complete:
        return
    for method in comparison.methods:
        scores = [[row.test for row in comparison.runs(task, method)] for task in complete]
        of_seeds = [fmean(of_seed) for of_seed in zip(*scores, strict=True)]
        test, test_sd = mean_sd(of_seeds)
        spreads = [sd for _, sd in map(mean_sd, scores) if sd is not None]
        spread = fmean(spreads) if spreads else None
        yield Average(method=method, test=test, test_sd=test_sd, spread=spread, worst=min(of_seeds))


def _draws(
    comparison: Comparison, task: str, resamples: int, seed: int
) -> dict[str, FloatArray] | None:
    """Return the resampled scores of a task's methods; none where a run kept no items."""
    groups: dict[str, list[Items]] = {}
    for method in comparison.methods:
        for row in comparison.runs(task, method):
            if row.items is None:
                return None
            if abs(score(row.items) - row.test) > SCORE_TOLERANCE:
                raise PipelineError(
                    f"{task}, {method}, seed {row.seed}: expected test items that give its test "
                    f"{row.metric} {row.test:.4f}, got {score(row.items):.4f} from them"
                )
            groups.setdefault(method, []).append(row.items)
    # a name's own draws, so that a task's interval does not depend on which others are compared
    own = (seed, zlib.crc32(task.encode()))
    return bootstrap(groups, resamples=resamples, seed=own) if groups else None


def _differences(
    comparison: Comparison,
    task: str | None,
    over: Sequence[str],
    draws: Mapping[str, dict[str, FloatArray] | None],
) -> Iterator[Difference]:
    """Yield the differences of the subject and each other method, averaged over some tasks."""
    subject = comparison.subject
    if subject is None:
        return
    for other in comparison.methods:
        runs = [(comparison.runs(name, subject), comparison.runs(name, other)) for name in over]
        if other == subject or not runs or not all(ours and theirs for ours, theirs in runs):
            continue
        drawn = [found for name in over if (found := draws[name]) is not None]
        ends: dict[str, float] = {}
        if len(drawn) == len(over):
            between = np.mean([found[subject] - found[other] for found in drawn], axis=0)
            ends = dict(zip(("low", "high", "p_value"), interval(between), strict=True))
        yield Difference(
            task=task,
            method=subject,
            other=other,
            value=fmean(
                fmean(row.test for row in ours) - fmean(row.test for row in theirs)
                for ours, theirs in runs
            ),
            **ends,
        )
