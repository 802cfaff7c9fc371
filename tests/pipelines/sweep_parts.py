"""Records of made-up sweeps, for the tests of what is done with them."""

from typing import Any

from pipelines.sweep.record import Finalist, SweepRecord, TrialRecord


def trial(number: int, **changes: Any) -> TrialRecord:
    """Return a trial that ended well, with some of its fields changed."""
    values: dict[str, Any] = {
        "number": number,
        "state": "complete",
        "params": {"prompt_length": 16, "learning_rate": 0.01},
        "origin": "drawn",
        "epochs": (0.5, 0.75),
        "value": 0.75,
        "seconds": 4.0,
    }
    return TrialRecord(**{**values, **changes})


def finalist(number: int, *scores: float) -> Finalist:
    """Return a finalist without spread."""
    return Finalist(number=number, scores=scores or (0.75,), mean=0.75, spread=0.0)


def sweep(*trials: TrialRecord, **changes: Any) -> SweepRecord:
    """Return a sweep of these trials, the first of which won."""
    values: dict[str, Any] = {
        "task": "intents",
        "metric": "accuracy",
        "study": "intents-0123456789ab",
        "space": {"prompt_length": [4, 64], "learning_rate": [1e-3, 1e-1]},
        "epochs": 2,
        "asked": len(trials),
        "trials": trials,
        "finalists": (finalist(trials[0].number),),
        "stopped": "",
        "seconds": 10.0,
        "date": "2026-01-02T03:04:05+00:00",
        "flow_run": "brave-fox",
    }
    return SweepRecord(**{**values, **changes})


def won_by(params: dict[str, Any], task: str = "intents") -> SweepRecord:
    """Return a sweep whose winner has these settings."""
    return sweep(trial(0, params=params), task=task)
