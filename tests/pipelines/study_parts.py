"""A finished sweep to look at, with all that can happen to a trial, and smaller ones."""

import math
import random
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from pipelines.sweep.record import Finalist, SweepRecord, TrialRecord

EPOCHS = 10
HOSTILE = '</script><img src="http://x.example/a">|[red]*'
SPACE = {
    "prompt_length": [4, 64],
    "learning_rate": [0.001, 0.03],
    "head_learning_rate": [0.0005, 0.02],
    "reparameterization": ["embedding", "mlp"],
    "prompt_dropout": [0.0, 0.3],
    "weight_decay": None,
    "prompt_layers": ["all", 4],
}
PRUNED = {3: 3, 6: 2, 8: 4, 11: 2, 12: 3, 15: 5, 18: 2, 22: 3}
"""Trials given up, and after how many epochs."""

FAILED = {5: "the loss is nan in epoch 2; lower the learning rate", 19: HOSTILE}
CRASHED = {13: "its process died 3 times; the last signal was SIGKILL"}
RETRIES = {2: 1, 13: 2, 16: 1}
CHANGED = {9: "out of memory: batch_size halved to 16, accumulate 2"}


def trial(number: int = 0, **changes: Any) -> TrialRecord:
    """Return a complete trial of a learning rate alone."""
    values: dict[str, Any] = {
        "number": number,
        "state": "complete",
        "params": {"learning_rate": 0.01},
        "origin": "drawn",
        "epochs": (0.5, 0.7, 0.6),
        "value": 0.7,
        "seconds": 12.0,
    }
    return TrialRecord(**{**values, **changes})


def failed(number: int, **changes: Any) -> TrialRecord:
    """Return a trial that failed before its first epoch ended."""
    return trial(number, **{"state": "failed", "value": None, "epochs": (), **changes})


def finalist(number: int, *scores: float) -> Finalist:
    """Return a finalist by the scores of its seeds."""
    spread = stdev(scores) if len(scores) > 1 else 0.0
    return Finalist(number=number, scores=scores, mean=fmean(scores), spread=spread)


def record(trials: tuple[TrialRecord, ...] | None = None, **changes: Any) -> SweepRecord:
    """Return the sweep of some trials; one finalist, the best of them."""
    trials = (trial(),) if trials is None else trials
    best = max((one for one in trials if one.state == "complete"), key=lambda one: one.value or 0.0)
    values: dict[str, Any] = {
        "task": "rte",
        "metric": "accuracy",
        "study": "rte-4f1c",
        "space": {"learning_rate": [0.001, 0.03]},
        "epochs": 3,
        "asked": len(trials),
        "trials": trials,
        "finalists": (finalist(best.number, best.value or 0.0),),
        "stopped": "",
        "seconds": 75.0,
        "date": "2026-11-23T10:00:00+00:00",
        "flow_run": "olive-otter",
    }
    return SweepRecord(**{**values, **changes})


def sample(seed: int = 0) -> SweepRecord:
    """Return 24 trials in all states, of which long prompts and middling rates are best."""
    rng = random.Random(seed)
    trials = tuple(_drawn(number, rng) for number in range(24))
    complete = sorted(
        (one for one in trials if one.state == "complete"), key=lambda one: -(one.value or 0.0)
    )
    first, second, third = (one.number for one in complete[:3])
    scores = tuple(one.value or 0.0 for one in complete[:3])
    # the best single score is a lucky one: its other seeds are worse
    finalists = (
        finalist(second, scores[1], 0.728, 0.719),
        finalist(third, scores[2], 0.715, 0.709),
        finalist(first, scores[0], 0.701, 0.684),
    )
    return record(
        trials,
        space=SPACE,
        epochs=EPOCHS,
        asked=30,
        finalists=finalists,
        stopped="an improvement of more than 0.001 is improbable (terminator, 24 trials)",
        seconds=1534.2,
    )


def only_learning_rate_matters(count: int = 24) -> SweepRecord:
    """Return complete trials whose scores are a function of the learning rate alone."""
    rng = random.Random(7)
    trials = []
    for number in range(count):
        params = {
            "prompt_length": round(math.exp(rng.uniform(math.log(4), math.log(64)))),
            "learning_rate": math.exp(rng.uniform(math.log(0.001), math.log(0.03))),
            "prompt_dropout": rng.uniform(0.0, 0.3),
        }
        score = 0.9 - 0.1 * math.log(params["learning_rate"] / 0.008) ** 2
        trials.append(trial(number, params=params, epochs=(score - 0.1, score), value=score))
    space = {key: SPACE[key] for key in ("prompt_length", "learning_rate", "prompt_dropout")}
    return record(tuple(trials), space=space, epochs=2)


def of_one_setting(name: str, *values: Any) -> SweepRecord:
    """Return complete trials of different scores, each with a value of one setting."""
    trials = tuple(
        trial(number, params={name: value}, value=round(0.6 + 0.01 * number, 2))
        for number, value in enumerate(values)
    )
    return record(trials, space={name: SPACE[name]})


def all_failed_but_one() -> SweepRecord:
    """Return four trials that failed and one that did not."""
    return record((*(failed(number) for number in range(4)), trial(4)))


def renumbered(made: SweepRecord, step: int) -> SweepRecord:
    """Return the sweep with gaps between the numbers of its trials."""
    return replace(
        made,
        trials=tuple(replace(one, number=step * one.number) for one in made.trials),
        finalists=tuple(replace(one, number=step * one.number) for one in made.finalists),
    )


def _drawn(number: int, rng: random.Random) -> TrialRecord:
    params: dict[str, Any] = {
        "prompt_length": round(math.exp(rng.uniform(math.log(4), math.log(64)))),
        "learning_rate": math.exp(rng.uniform(math.log(0.001), math.log(0.03))),
        "head_learning_rate": math.exp(rng.uniform(math.log(0.0005), math.log(0.02))),
        "reparameterization": rng.choice(["embedding", "mlp"]),
        "prompt_dropout": rng.uniform(0.0, 0.3),
        "prompt_layers": rng.choice(["all", 4]),
    }
    reached = (
        0.74
        - 0.05 * math.log(params["learning_rate"] / 0.008) ** 2
        - 0.02 * math.log(params["prompt_length"] / 32) ** 2
        - 0.05 * params["prompt_dropout"]
        + rng.gauss(0, 0.004)
    )
    length = PRUNED.get(number, EPOCHS)
    if number in FAILED or number in CRASHED:
        length = 1
    curve = tuple(
        round(0.5 + (reached - 0.5) * (1 - math.exp(-epoch / 2.5)) + rng.gauss(0, 0.004), 4)
        for epoch in range(1, length + 1)
    )
    state = "complete"
    for ended, numbers in (("pruned", PRUNED), ("failed", FAILED), ("crashed", CRASHED)):
        if number in numbers:
            state = ended
    message = FAILED.get(number) or CRASHED.get(number) or CHANGED.get(number) or ""
    return trial(
        number,
        state=state,
        params=params,
        origin={0: "baseline", 1: "first", 2: "transferred"}.get(number, "drawn"),
        epochs=curve,
        value=None if state in ("failed", "crashed") else max(curve),
        seconds=round(6.5 * length + rng.uniform(0, 4), 1),
        retries=RETRIES.get(number, 0),
        message=message,
    )
