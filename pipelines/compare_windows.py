"""What the learning-rate windows of a comparison say."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from pipelines.compare_data import Comparison, Window, WindowRun
from pipelines.compare_stats import Summary, share_at_least, window


@dataclass(frozen=True, kw_only=True)
class WindowCell:
    """One task and name.

    Attributes:
        task: The task.
        method: The name of what was tuned.
        rates: Lowest first.
        scores: Mean over seeds of the best dev score at each rate.
        diverged: How many of the trainings at each rate diverged.
        share: Of the range, in logs, in which the score is within a point of its best.
        probe_share: Likewise, in which it is at least that of the probe; none without a probe.
    """

    task: str
    method: str
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    diverged: tuple[int, ...]
    share: float
    probe_share: float | None

    @property
    def best(self) -> float:
        """The highest score."""
        return max(self.scores)

    @property
    def best_rate(self) -> float:
        """The lowest rate that has it."""
        return self.rates[self.scores.index(self.best)]


@dataclass(frozen=True, kw_only=True)
class WindowAverage:
    """One name, as a mean over tasks.

    Attributes:
        method: The name.
        best: Of the best dev scores.
        share: Of the windows.
        probe_share: Of the shares at or above the probe; none where a task has none.
    """

    method: str
    best: float
    share: float
    probe_share: float | None


@dataclass(frozen=True, kw_only=True)
class Windows:
    """All windows of a comparison."""

    cells: tuple[WindowCell, ...]
    averages: tuple[WindowAverage, ...]


def summarise_windows(comparison: Comparison, summary: Summary) -> Windows | None:
    """Compute what tables and plots show of the windows; none where none were asked for."""
    found = comparison.window
    if found is None:
        return None
    places = [(task.name, name) for task in comparison.tasks for name in found.methods]
    cells = tuple(
        _cell(runs, probe_score(comparison, summary, task))
        for task, name in places
        if (runs := _runs(found, task, name))
    )
    return Windows(cells=cells, averages=tuple(_averages(found, cells)))


def probe_score(comparison: Comparison, summary: Summary, task: str) -> float | None:
    """Return the probe's mean dev score; none where none is compared, or has a run."""
    cell = summary.cell(task, comparison.first_of("probe") or "")
    return None if cell is None else cell.dev


def _runs(found: Window, task: str, name: str) -> list[WindowRun]:
    return [run for run in found.runs if (run.task, run.method) == (task, name)]


def _cell(runs: list[WindowRun], probe: float | None) -> WindowCell:
    rates = tuple(sorted({run.learning_rate for run in runs}))
    by_rate = [[run for run in runs if run.learning_rate == rate] for rate in rates]
    scores = tuple(fmean(run.dev for run in of_rate) for of_rate in by_rate)
    return WindowCell(
        task=runs[0].task,
        method=runs[0].method,
        rates=rates,
        scores=scores,
        diverged=tuple(sum(run.is_diverged for run in of_rate) for of_rate in by_rate),
        share=window(rates, scores),
        probe_share=None if probe is None else share_at_least(rates, scores, probe),
    )


def _averages(found: Window, cells: tuple[WindowCell, ...]) -> Iterator[WindowAverage]:
    for name in found.methods:
        own = [cell for cell in cells if cell.method == name]
        if not own:
            continue
        shares = [cell.probe_share for cell in own if cell.probe_share is not None]
        yield WindowAverage(
            method=name,
            best=fmean(cell.best for cell in own),
            share=fmean(cell.share for cell in own),
            probe_share=fmean(shares) if len(shares) == len(own) else None,
        )
