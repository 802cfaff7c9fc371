"""What `ptv2 compare` compares: final runs, trials, windows, data. Values only; no statistics.

What is compared goes by a name: that of a method, or that of a variant, which is a method with
settings of its own.

Letters: I test items, F features of an item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipelines.errors import PipelineError
from ptv2_core.config import Method

ItemKind = Literal["mean", "f1", "pearson"]
FloatArray = npt.NDArray[np.float64]

COLUMNS: dict[ItemKind, tuple[str, ...]] = {
    "mean": ("score",),
    "f1": ("correct", "predicted", "gold"),
    "pearson": ("predicted", "gold"),
}


@dataclass(frozen=True, kw_only=True)
class Items:
    """What each item of a test split brings to the score: what a bootstrap draws from.

    An item is what is drawn at random when a test split is made: a row, a sentence, or all answers
    to one question, whose outcomes hang together.

    Attributes:
        kind: How items become a score: `mean` of their scores, `f1` of their summed counts, or the
            `pearson` correlation of two columns.
        values: The numbers of each item, in the order of the split: `[score]`,
            `[correct, predicted, gold]` or `[predicted, gold]`.
    """

    kind: ItemKind
    values: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        """Refuse items that cannot be scored."""
        columns = COLUMNS[self.kind]
        lengths = {len(value) for value in self.values}
        if lengths != {len(columns)}:
            raise PipelineError(
                f"items of kind {self.kind}: expected one item or more, each "
                f"[{', '.join(columns)}]; got {len(self.values)} of length {sorted(lengths)}"
            )

    @cached_property
    def features(self) -> FloatArray:
        """`[I, F]`: numbers whose sums over any resample give its score."""
        values = np.asarray(self.values, dtype=np.float64)
        if self.kind != "pearson":
            return values
        # a correlation is the same after a shift and a scaling, and its sums lose fewer digits
        spread = values.std(axis=0)
        x, y = ((values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)).T
        return np.stack([x, y, x * x, y * y, x * y], axis=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One final run.

    Attributes:
        task: The task.
        method: The name of what was tuned: a method, or a variant.
        seed: Of start, order and dropout.
        metric: The score.
        dev: Score on dev, 0 to 1 (a correlation: -1 to 1).
        test: Score on the held-out split.
        tuned_share: Tuned parameters, the head aside, by those of the backbone.
        tuned_parameters: Their number, the head aside.
        artifact_bytes: What must be kept for the task.
        seconds: Of training.
        peak_memory_bytes: Of training; none where it was not measured.
        settings: What was chosen: prompt_length, learning_rate, prompt_layers, ...
        history: `(epoch, train_loss, dev_score)` of each epoch; the loss in nats.
        test_metrics: All metrics on the held-out split.
        items: What each test item brings; none where it was not kept.
    """

    task: str
    method: str
    seed: int
    metric: str
    dev: float
    test: float
    tuned_share: float
    tuned_parameters: int
    artifact_bytes: int
    seconds: float
    peak_memory_bytes: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[tuple[int, float, float], ...] = ()
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    items: Items | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a search.

    Attributes:
        task: The task.
        method: The name of what was tuned.
        number: The study's.
        value: Best dev score; none where it failed.
        settings: What was tried.
        state: `complete`, `pruned` or `failed`.
    """

    task: str
    method: str
    number: int
    value: float | None
    settings: Mapping[str, Any]
    state: str


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """The data of one task.

    Attributes:
        name: The task.
        kind: Its kind.
        metric: What is scored.
        train: Rows.
        dev: Rows.
        test: Rows.
        cut: How the data was cut, in words; empty: not at all.
    """

    name: str
    kind: str
    metric: str
    train: int
    dev: int
    test: int
    cut: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method with settings of its own.

    Attributes:
        name: What it goes by.
        method: What it is.
        changes: What it lays over the settings of `train`.
    """

    name: str
    method: Method
    changes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WindowRun:
    """One training at one learning rate of a window.

    Attributes:
        task: The task.
        method: The name of what was tuned.
        seed: Of start, order and dropout.
        learning_rate: Its peak.
        dev: Best score on dev, 0 where it diverged.
        is_diverged: Whether it could not go on, such as at a loss that is not finite.
    """

    task: str
    method: str
    seed: int
    learning_rate: float
    dev: float
    is_diverged: bool = False


@dataclass(frozen=True, kw_only=True)
class Window:
    """Trainings over a range of learning rates around each name's own.

    Attributes:
        methods: The names, in the order of the tables.
        factor: The highest rate by the lowest.
        points: How many rates, evenly spaced in logs.
        seeds: Of each.
        train: What was laid over the settings of all of them.
        moved: `(task, name)` whose range is not around its own rate, but below the highest that
            its method allows.
        runs: The trainings.
    """

    methods: tuple[str, ...]
    factor: float
    points: int
    seeds: tuple[int, ...]
    train: Mapping[str, Any]
    moved: tuple[tuple[str, str], ...]
    runs: tuple[WindowRun, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tasks x methods x seeds, and how they came about.

    Attributes:
        methods: The names of all that were asked for, in the order of the tables.
        seeds: All that were asked for.
        tasks: All that were asked for.
        rows: The finished runs.
        trials: Of all searches.
        chosen_on: Which split chose the hyper-parameters, in words.
        num_trials: Trials of a search, by name.
        backbone: Its name.
        backbone_parameters: Their number.
        backbone_layers: Its depth.
        machine: One line about it.
        date: When, in ISO 8601.
        versions: Of the packages that matter.
        git_commit: Of the code; none outside a repository.
        results: Where the results are.
        variants: Those among the names, and among those of the window.
        window: Over learning rates; none where none was asked for.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    tasks: tuple[TaskFacts, ...]
    rows: tuple[Row, ...]
    trials: tuple[Trial, ...]
    chosen_on: str
    num_trials: Mapping[str, int]
    backbone: str
    backbone_parameters: int
    backbone_layers: int
    machine: str
    date: str
    versions: Mapping[str, str]
    git_commit: str | None
    results: str
    variants: tuple[Variant, ...] = ()
    window: Window | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that was trained: what is compared, then what only the window is about."""
        return tuple(dict.fromkeys((*self.methods, *(self.window.methods if self.window else ()))))

    @property
    def subject(self) -> str | None:
        """What all others are held against: P-Tuning v2, if it is there."""
        return self.first_of("ptv2")

    def method_of(self, name: str) -> str:
        """Return the method of a name; that of no variant is a method's own."""
        return next((one.method for one in self.variants if one.name == name), name)

    def first_of(self, method: Method) -> str | None:
        """Return the method's own name where it is compared, or else the first variant of it."""
        found = [name for name in self.methods if self.method_of(name) == method]
        return method if method in found else next(iter(found), None)

    def runs(self, task: str, method: str) -> list[Row]:
        """Return the finished runs of a task and method for the seeds asked for, by seed."""
        found = [
            row
            for row in self.rows
            if (row.task, row.method) == (task, method) and row.seed in self.seeds
        ]
        return sorted(found, key=lambda row: row.seed)
