"""What a sweep found, as `sweep.json` holds it: plain values, no vendor."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.schema import nested
from ptv2_core.files import write_json_atomic

FILE = "sweep.json"

TrialState = Literal["complete", "pruned", "failed", "crashed"]
Origin = Literal["baseline", "first", "transferred", "drawn"]


def in_words(params: Mapping[str, Any]) -> str:
    """Return what was drawn in one line."""
    return ", ".join(
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in params.items()
    )


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial that has ended.

    Attributes:
        number: Of the trial in its study.
        state: `complete`; `pruned`: given up early; `failed`: an exception; `crashed`: its process
            died more often than it is tried again.
        params: What was drawn, by the names of `search.space`.
        origin: Whether its settings are those of `train`, of `search.first`, of an earlier study,
            or drawn.
        epochs: Score on dev after each epoch.
        value: The best of them; none where it failed or crashed.
        seconds: From its start to its end, waiting for a retry included.
        retries: How often its process died and it went on from its checkpoint.
        message: Why it failed or crashed, or what had to be changed to go on; empty otherwise.
    """

    number: int
    state: TrialState
    params: dict[str, Any]
    origin: Origin
    epochs: tuple[float, ...]
    value: float | None
    seconds: float
    retries: int = 0
    message: str = ""

    @property
    def changes(self) -> dict[str, Any]:
        """What was drawn, nested as in the train section."""
        return nested(self.params)


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """One of the best trials, trained again with further seeds.

    Attributes:
        number: Of the trial.
        scores: Best score on dev of each seed, the trial's own first.
        mean: Of the scores.
        spread: Their standard deviation (n - 1); 0 of one.
    """

    number: int
    scores: tuple[float, ...]
    mean: float
    spread: float

    @property
    def rank(self) -> float:
        """What finalists are ordered by: mean minus spread."""
        return self.mean - self.spread


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A finished sweep.

    Attributes:
        task: The task.
        metric: What was maximised on dev.
        study: Name of the study.
        space: The ranges that were drawn from, by name.
        epochs: Of a full trial.
        asked: Trials that were asked for.
        trials: Those that ended, by number.
        finalists: Best first; one at least.
        stopped: Why it ended before `asked` trials; empty where it did not.
        seconds: Of the last process that worked on it.
        date: When it ended, ISO 8601 with its zone.
        flow_run: Prefect's name of the flow run.
    """

    task: str
    metric: str
    study: str
    space: dict[str, Any]
    epochs: int
    asked: int
    trials: tuple[TrialRecord, ...]
    finalists: tuple[Finalist, ...]
    stopped: str
    seconds: float
    date: str
    flow_run: str

    @property
    def winner(self) -> TrialRecord:
        """The trial of the best finalist."""
        return next(one for one in self.trials if one.number == self.finalists[0].number)

    @property
    def epochs_spent(self) -> int:
        """Epochs that all trials were trained for, finalists' further seeds left out."""
        return sum(len(one.epochs) for one in self.trials)

    def counts(self) -> dict[str, int]:
        """Return how many trials ended in each state."""
        states = [one.state for one in self.trials]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    def write(self, folder: Path) -> None:
        """Write `sweep.json` into a folder."""
        write_json_atomic(folder / FILE, asdict(self))

    @classmethod
    def read(cls, paths: TaskPaths) -> "SweepRecord":
        """Return a task's last sweep.

        Raises:
            PipelineError: There is none, or it is damaged; says what to run.
        """
        file = paths.require(paths.sweep / FILE, "sweep")
        try:
            found = cls.from_mapping(json.loads(file.read_text(encoding="utf-8")))
            _ = found.winner
        except (ValueError, LookupError, TypeError, StopIteration) as error:
            raise PipelineError(
                f"{file}: expected the record of a sweep; run `ptv2 sweep --task {paths.task}` "
                "again, which keeps its trials"
            ) from error
        return found

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SweepRecord":
        """Build from what `write` wrote."""
        trials = [
            TrialRecord(**{**one, "epochs": tuple(one["epochs"])}) for one in values["trials"]
        ]
        finalists = [
            Finalist(**{**one, "scores": tuple(one["scores"])}) for one in values["finalists"]
        ]
        return cls(**{**values, "trials": tuple(trials), "finalists": tuple(finalists)})
