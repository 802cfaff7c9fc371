"""Optuna on a finished sweep: which settings mattered, and its plots as PNG."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from pipelines.sweep.record import SweepRecord, TrialRecord

STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "crashed": TrialState.FAIL,
}
WHOLE = ("prompt_length",)
LOGARITHMIC = ("prompt_length", "learning_rate", "head_learning_rate", "weight_decay")
NUMERIC = (*LOGARITHMIC, "prompt_dropout")
"""Dimensions between two numbers, those that are looked at first in front; others are lists."""

FEWEST_TRIALS = 4
"""With fewer scores, chance alone says which setting mattered."""

BETTER_SHARE = 0.5
"""Trials that are taken as good ones. A tenth, as Optuna has it, is two of a short sweep."""

DPI = 120
WIDTH_IN, HEIGHT_IN = 8.0, 5.0
# room for labels of parallel coordinates, inch
DIMENSION_IN = 1.8
# of the width, for the longest name of a choice
NAMES_SHARE = 0.08


@dataclass(frozen=True, kw_only=True)
class Importances:
    """How much each setting parts the better half of the trials from the others.

    Attributes:
        shares: By name, the largest first; they sum to 1. None where they cannot be told.
        says: A sentence: the shares and what they rest on, or why there are none.
    """

    shares: Mapping[str, float] | None
    says: str


def study_of(record: SweepRecord) -> optuna.Study:
    """Return the sweep as a study of Optuna in memory, trials with the numbers they had.

    A number that is missing in the sweep is one of a trial that failed without settings.
    """
    numbered = {one.number: one for one in record.trials}
    distributions = _distributions(record)
    study = _empty_study(record.study)
    for number in range(max(numbered) + 1):
        ended = numbered.get(number)
        if ended is None:
            study.add_trial(optuna.create_trial(state=TrialState.FAIL))
        else:
            study.add_trial(_frozen(ended, STATES[ended.state], distributions))
    return study


def importances(record: SweepRecord) -> Importances:
    """Return what the scores say about each setting, by PED-ANOVA.

    A pruned trial counts with the best score it had: it was given up because it was not among the
    better half, and without it a sweep that prunes would know nothing of bad settings.
    """
    scored = [one for one in record.trials if one.value is not None]
    complete = sum(one.state == "complete" for one in scored)
    varied = varied_names(scored)
    if complete < FEWEST_TRIALS:
        says = (
            f"Importance of the settings: not told; it takes {FEWEST_TRIALS} complete trials, "
            f"and there are {complete}."
        )
        return Importances(shares=None, says=says)
    if len(varied) < 2:
        only = f"only {varied[0]} was" if varied else "nothing was"
        return Importances(
            shares=None, says=f"Importance of the settings: not told; {only} drawn from a range."
        )
    if len({one.value for one in scored}) < 2:
        return Importances(
            shares=None, says="Importance of the settings: not told; all trials score the same."
        )
    with _quiet():
        found = optuna.importance.get_param_importances(
            _scored_study(record), evaluator=_evaluator(), params=varied
        )
    shares = dict(sorted(found.items(), key=lambda item: -item[1]))
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    says = f"Importance of the settings, from {len(scored)} trials with a score: {told}."
    return Importances(shares=shares, says=says)


def varied_names(trials: Sequence[TrialRecord]) -> list[str]:
    """Return the settings that have different values, those between two numbers first."""
    names = dict.fromkeys(name for one in trials for name in one.params)
    values = {
        name: {categorical(one.params[name]) for one in trials if name in one.params}
        for name in names
    }
    ordered = [*(name for name in NUMERIC if name in names), *names]
    return [name for name in dict.fromkeys(ordered) if len(values[name]) > 1]


def surface_names(record: SweepRecord) -> tuple[str, str] | None:
    """Return the two numbers that a contour of the complete trials can show; None without two."""
    complete = [one for one in record.trials if one.state == "complete"]
    if len({one.value for one in complete}) < 2:
        return None
    numbers = [name for name in varied_names(complete) if name in NUMERIC]
    return (numbers[0], numbers[1]) if len(numbers) > 1 else None


def slice_name(record: SweepRecord) -> str | None:
    """Return the setting that the scores can be shown by; None where no two trials differ."""
    names = varied_names([one for one in record.trials if one.state == "complete"])
    return names[0] if names else None


def categorical(value: Any) -> Any:
    """Return a choice as one that can be compared: what is no scalar as text."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write_png(record: SweepRecord, folder: Path) -> list[Path]:
    """Write Optuna's plots into a folder, each as a PNG; returns them.

    A plot that this sweep gives nothing to draw for is not there, not even that of an earlier one.
    """
    # needs no display
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Optuna sets a style of its own for the whole process
    with _quiet(), plt.style.context("default"):
        for name, figure in _drawn(record):
            file = folder / f"{name}.png"
            if figure is None:
                file.unlink(missing_ok=True)
                continue
            figure.savefig(file, dpi=DPI, bbox_inches="tight")
            plt.close(figure)
            written.append(file)
    return written


def _drawn(record: SweepRecord) -> Iterator[tuple[str, Figure | None]]:
    """Yield each plot by its name; None where there is nothing to draw."""
    study = study_of(record)
    score = f"dev {record.metric}"
    yield "history", _history(study, score)
    yield "importances", _importances(record)
    yield "surface", _surface(record, study, score)
    yield "parallel", _parallel(record, study, score)
    yield "epochs", _epochs(record, study, score)


def _history(study: optuna.Study, score: str) -> Figure:
    axes = plots.plot_optimization_history(study, target_name=score)
    axes.set_title("Score of each complete trial")
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure = _sized(axes)
    axes.legend(["trial", "best so far"], loc="best")
    return figure


def _importances(record: SweepRecord) -> Figure | None:
    shares = importances(record).shares
    if shares is None:
        return None
    axes = plots.plot_param_importances(
        _scored_study(record), evaluator=_evaluator(), params=list(shares)
    )
    axes.set_title("Which settings part the better half of the trials from the others", loc="left")
    axes.set(xlabel="share of the importance", ylabel="")
    return _sized(axes)


def _surface(record: SweepRecord, study: optuna.Study, score: str) -> Figure | None:
    names = surface_names(record)
    if names is not None:
        axes = plots.plot_contour(study, params=list(names), target_name=score)
        # of two settings there is one plot, as of one below
        assert isinstance(axes, Axes)
        axes.set_title("Score over the two settings, between the complete trials")
        return _sized(axes)
    name = slice_name(record)
    if name is None:
        return None
    axes = plots.plot_slice(study, params=[name], target_name=score)
    assert isinstance(axes, Axes)
    axes.set_title(f"Score by {name}, complete trials")
    return _sized(axes)


def _parallel(record: SweepRecord, study: optuna.Study, score: str) -> Figure | None:
    complete = [one for one in record.trials if one.state == "complete"]
    names = varied_names(complete)
    if not names:
        return None
    axes = plots.plot_parallel_coordinate(study, params=names, target_name=score)
    axes.set_title("Settings of the complete trials, a line each")
    lines = axes.collections[0]
    # the first colours of Optuna's are those of the ground
    lines.set_cmap("viridis")
    assert lines.colorbar is not None
    beside = lines.colorbar.ax
    place = beside.get_position()
    # the names of the last axis stand where the colours would
    beside.set_position((place.x0 + NAMES_SHARE, place.y0, place.width, place.height))
    return _sized(axes, width=max(WIDTH_IN, DIMENSION_IN * (len(names) + 1)))


def _epochs(record: SweepRecord, study: optuna.Study, score: str) -> Figure | None:
    if not any(one.epochs for one in record.trials if one.state in ("complete", "pruned")):
        return None
    axes = plots.plot_intermediate_values(study)
    axes.set_title("Score after each epoch, pruned trials as far as they went")
    axes.set(xlabel="epoch", ylabel=score)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _sized(axes)


def _sized(axes: Axes, width: float = WIDTH_IN) -> Figure:
    """Return the figure of a plot in its size, without a legend, with numbers people can read."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(width, HEIGHT_IN)
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    for one in figure.axes:
        for axis in (one.xaxis, one.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(FuncFormatter(_minor))
    return figure


def _minor(value: float, _place: int | None) -> str:
    """Return the number at a tick between powers of ten: at 2 and 5 alone, or they overlap."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _scored_study(record: SweepRecord) -> optuna.Study:
    """Return the trials with a score, all as complete ones."""
    distributions = _distributions(record)
    study = _empty_study(record.study)
    for one in record.trials:
        if one.value is not None:
            study.add_trial(_frozen(one, TrialState.COMPLETE, distributions))
    return study


def _empty_study(name: str) -> optuna.Study:
    with _quiet():
        return optuna.create_study(study_name=name, direction="maximize")


def _evaluator() -> PedAnovaImportanceEvaluator:
    return PedAnovaImportanceEvaluator(target_quantile=BETTER_SHARE)


def _frozen(
    ended: TrialRecord, state: TrialState, distributions: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    return optuna.create_trial(
        state=state,
        value=None if state == TrialState.FAIL else ended.value,
        params={name: _value(name, value) for name, value in ended.params.items()},
        distributions={name: distributions[name] for name in ended.params},
        intermediate_values=dict(enumerate(ended.epochs, start=1)),
        user_attrs={"origin": ended.origin, "message": ended.message},
    )


def _value(name: str, value: Any) -> Any:
    return value if name in NUMERIC else categorical(value)


def _distributions(record: SweepRecord) -> dict[str, BaseDistribution]:
    """Return each setting's distribution: its range, and what trials outside of it had.

    The settings of `train` and of earlier studies are tried wherever they lie.
    """
    names = dict.fromkeys(name for one in record.trials for name in one.params)
    return {
        name: _distribution(
            name,
            record.space.get(name) or (),
            [one.params[name] for one in record.trials if name in one.params],
        )
        for name in names
    }


def _distribution(name: str, limits: Sequence[Any], values: Sequence[Any]) -> BaseDistribution:
    every = [*limits, *values]
    if name not in NUMERIC:
        return CategoricalDistribution(tuple(dict.fromkeys(map(categorical, every))))
    low, high = min(every), max(every)
    # nought has no place on a logarithmic axis
    is_log = name in LOGARITHMIC and low > 0
    if name in WHOLE:
        return IntDistribution(int(low), int(high), log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing studies, and from warning of its own experimental plots."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
