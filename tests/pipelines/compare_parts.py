"""A small comparison with numbers that can be checked by hand, and a large one to look at."""

import math
import random

from pipelines.compare_data import (
    Comparison,
    Items,
    Row,
    TaskFacts,
    Trial,
    Variant,
    Window,
    WindowRun,
)

METHODS = ("probe", "prompt_tuning", "ptv2", "finetune")


def mean_items(hits: int, size: int) -> Items:
    """`size` items, the first `hits` of them right."""
    return Items(kind="mean", values=[[float(place < hits)] for place in range(size)])


def row(task="rte", method="ptv2", seed=0, *, hits=8, size=10, **changes) -> Row:
    values = {
        "metric": "accuracy",
        "dev": hits / size,
        "test": hits / size,
        "tuned_share": 0.01,
        "tuned_parameters": 1000,
        "artifact_bytes": 4096,
        "seconds": 2.0,
        "peak_memory_bytes": 3_000_000,
        "settings": {"prompt_length": 8, "learning_rate": 0.01, "prompt_layers": "all"},
        "history": ((1, 0.7, 0.5), (2, 0.5, hits / size)),
        "items": mean_items(hits, size),
    }
    return Row(task=task, method=method, seed=seed, **{**values, **changes})


def facts(name="rte", **changes) -> TaskFacts:
    values = {"kind": "classification", "metric": "accuracy", "train": 90, "dev": 10, "test": 10}
    return TaskFacts(name=name, **{**values, **changes})


def comparison(rows, **changes) -> Comparison:
    values = {
        "methods": tuple(dict.fromkeys(one.method for one in sorted(rows, key=_place))),
        "seeds": tuple(sorted({one.seed for one in rows})),
        "tasks": tuple(facts(name) for name in dict.fromkeys(one.task for one in rows)),
        "trials": (),
        "chosen_on": "dev (carved from train with seed 42)",
        "num_trials": {"ptv2": 6, "finetune": 6},
        "backbone": "all-minilm-l6-v2",
        "backbone_parameters": 22_565_376,
        "backbone_layers": 6,
        "machine": "2 cores, 8 GB, no GPU",
        "date": "2026-11-23T10:00:00+00:00",
        "versions": {"torch": "2.11.0"},
        "git_commit": "3382c9b",
        "results": "results/compare",
    }
    return Comparison(rows=tuple(rows), **{**values, **changes})


def _place(one: Row) -> int:
    return METHODS.index(one.method) if one.method in METHODS else len(METHODS)


def window_runs(task="rte", method="ptv2", seed=1, *, scores, rates) -> list[WindowRun]:
    """A run a rate; a score of None diverged."""
    return [
        WindowRun(
            task=task,
            method=method,
            seed=seed,
            learning_rate=rate,
            dev=score or 0.0,
            is_diverged=score is None,
        )
        for rate, score in zip(rates, scores, strict=True)
    ]


def window(runs, **changes) -> Window:
    values = {
        "methods": tuple(dict.fromkeys(run.method for run in runs)),
        "factor": 100.0,
        "points": len({run.learning_rate for run in runs}),
        "seeds": tuple(sorted({run.seed for run in runs})),
        "train": {},
        "moved": (),
    }
    return Window(runs=tuple(runs), **{**values, **changes})


PLAIN = Variant(
    name="plain",
    method="ptv2",
    changes={"learning_rate": 0.003, "prompt": {"start": "normal", "start_std": 1.0}},
)


def varied() -> Comparison:
    """Return a small comparison with a variant and windows."""
    chance = random.Random(3)
    levels = {"probe": 0.7, "ptv2": 0.85, "plain": 0.8, "finetune": 0.86}
    rows = [
        row(task, method, seed, hits=round(200 * level) - 5 * seed - 10 * place, size=200)
        for place, task in enumerate(("rte", "cb", "snips-slots"))
        for method, level in levels.items()
        for seed in (1, 2, 3)
    ]
    rates = [10 ** (place / 4 - 3) for place in range(9)]
    runs = [
        run
        for task in ("rte", "cb", "snips-slots")
        for method, width in (("ptv2", 0.35), ("plain", 0.8))
        for seed in (1, 2)
        for run in window_runs(
            task,
            method,
            seed,
            rates=rates,
            scores=[
                None
                if (method, place) == ("plain", 8)
                else levels[method] - width * abs(place - 4) ** 2 / 30 - chance.uniform(0, 0.01)
                for place in range(9)
            ],
        )
    ]
    return comparison(
        rows,
        methods=tuple(levels),
        variants=(PLAIN,),
        window=window(runs, moved=(("cb", "plain"),), train={"epochs": 4}),
    )


SAMPLE_TASKS = {
    "rte": ("classification", "accuracy", 0.70, 277),
    "cb": ("classification", "accuracy", 0.85, 56),
    "boolq": ("classification", "accuracy", 0.72, 600),
    "copa": ("multiple_choice", "accuracy", 0.60, 100),
    "multirc": ("multirc", "f1a", 0.62, 300),
    "banking77": ("classification", "accuracy", 0.90, 3080),
    "snips-slots": ("tagging", "span_f1", 0.93, 700),
    "snips-intents": ("classification", "accuracy", 0.97, 700),
    "squad1": ("qa", "f1", 0.74, 2000),
    "up-ewt-srl": ("srl", "span_f1", 0.66, 1500),
}
GAINS = {"probe": -0.15, "prompt_tuning": -0.06, "ptv2": -0.005, "finetune": 0.0}
SHARES = {"probe": 0.0, "prompt_tuning": 0.0003, "ptv2": 0.004, "finetune": 1.0}


def sample() -> Comparison:
    """Return a made-up comparison of the size of a real one."""
    chance = random.Random(7)
    rows, trials = [], []
    for task, (_, metric, level, size) in SAMPLE_TASKS.items():
        for method in METHODS:
            for number in range(8 if method != "probe" else 4):
                settings = {
                    "learning_rate": 10 ** chance.uniform(-3, -1.3),
                    "prompt_length": chance.choice([4, 8, 16, 24, 32, 64]),
                    "prompt_layers": chance.choice(["all", 4, 2]),
                    "reparameterization": chance.choice(["embedding", "mlp"]),
                }
                if method in ("probe", "finetune"):
                    settings = {"learning_rate": settings["learning_rate"]}
                value = level + GAINS[method] - abs(chance.gauss(0, 0.05))
                state = ("complete", "pruned", "failed")[chance.choices([0, 1, 2], [6, 3, 1])[0]]
                trials.append(
                    Trial(
                        task=task,
                        method=method,
                        number=number,
                        value=None if state == "failed" else value,
                        settings=settings,
                        state=state,
                    )
                )
            rows += [
                _sample_row(task, method, seed, metric, level + GAINS[method], size, chance)
                for seed in (0, 1, 2)
                if (task, method, seed) != ("cb", "finetune", 2)
            ]
    tasks = [
        facts(
            name,
            kind=kind,
            metric=metric,
            train=size * 4,
            dev=size // 2,
            test=size,
            cut="the first 8,000 rows of train after a shuffle with seed 42"
            if name in ("squad1", "boolq")
            else "",
        )
        for name, (kind, metric, _, size) in SAMPLE_TASKS.items()
    ]
    return comparison(
        rows, trials=tuple(trials), tasks=tuple(tasks), num_trials=dict.fromkeys(METHODS, 8)
    )


def _sample_row(task, method, seed, metric, level, size, chance) -> Row:
    right = [float(chance.random() < level) for _ in range(size)]
    values = [[one] for one in right]
    test = sum(right) / size
    if metric in ("span_f1", "f1a"):
        values = [[3 * one, 3.0, 3.0] for one in right]
    epochs = chance.randint(7, 12)
    history = tuple(
        (epoch, 1.5 * math.exp(-epoch / 4), level * (1 - 0.5 * math.exp(-epoch / 2.5)))
        for epoch in range(1, epochs + 1)
    )
    share = SHARES[method]
    settings = {"learning_rate": 0.01}
    if method in ("prompt_tuning", "ptv2"):
        settings |= {"prompt_length": 16, "prompt_layers": "all", "reparameterization": "embedding"}
    return row(
        task,
        method,
        seed,
        metric=metric,
        dev=history[-1][2],
        test=test,
        tuned_share=share,
        tuned_parameters=int(share * 22_565_376),
        artifact_bytes=int(share * 22_565_376) * 4 + 6_400,
        seconds=chance.uniform(20, 400),
        peak_memory_bytes=int(chance.uniform(0.6e9, 2e9)),
        settings=settings,
        history=history,
        items=Items(kind="f1" if len(values[0]) == 3 else "mean", values=values),
    )
