"""`python -m benchmarks.shared NAME`: does a shared prompt help?

Run in a workspace whose params.yaml has `multitask.shared.NAME` and whose tasks are prepared. Three
ways with the same settings and epochs, a seed after the other: each task alone; all tasks together
on one prompt; each task alone again, from the shared prompt. A seed is written down as it ends, so
that a run that was stopped goes on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.multitask import shared_model
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import load_settings
from pipelines.stages.training import backbone_for, overlay
from ptv2_core.artifact import Weights
from ptv2_core.config import TrainConfig
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.fit import fit, fit_together
from ptv2_core.training.start import Start, new_model

ALONE, TOGETHER, APART = "alone", "together", "apart, from the shared prompt"
Row = dict[str, Any]


def main() -> None:
    """Train what has not been trained, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a key of multitask.shared")
    parser.add_argument("--json", type=Path, required=True, help="where the scores are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    settings = load_settings(Path("params.yaml"))
    shared = settings.multitask.shared[arguments.name]
    prepared = [Prepared.load(TaskPaths(root=Path(), task=task).prepared) for task in shared.tasks]
    backbone = backbone_for(settings.task(shared.tasks[0]), prepared[0], method="ptv2")
    config = overlay(settings.train, shared.train)
    file: Path = arguments.json
    rows: list[Row] = json.loads(file.read_text()) if file.is_file() else []
    for seed in arguments.seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        own = overlay(config, {"seed": seed})
        rows += _one_seed(backbone, prepared, own, shared.temperature)
        write_json_atomic(file, rows)
    Console(width=110).print(table(rows))


def _one_seed(
    backbone: Backbone, prepared: list[Prepared], config: TrainConfig, temperature: float
) -> list[Row]:
    """Train one seed in all three ways."""
    together = _together(backbone, prepared, config, temperature)
    rows = [_row(together, slot, one, config, TOGETHER) for slot, one in enumerate(prepared)]
    for slot, one in enumerate(prepared):
        weights = Weights.of(together, slot)
        assert weights.prompt is not None, "a shared prompt is one"
        head = (weights.head_weight, weights.head_bias)
        start = Start(prompt=weights.prompt, digest="", head=head)
        for way, begun in ((ALONE, None), (APART, start)):
            train, dev = one.splits["train"], one.splits["dev"]
            model = new_model(backbone, one.task, config, train, start=begun)
            for _ in fit(model, task=one.task, train=train, dev=dev, config=config):
                pass
            rows.append(_row(model, 0, one, config, way))
    return rows


def _together(
    backbone: Backbone, prepared: list[Prepared], config: TrainConfig, temperature: float
) -> PromptedModel:
    model, sources = shared_model(backbone, prepared, config)
    for _ in fit_together(model, sources, config=config, temperature=temperature):
        pass
    return model


def _row(model: PromptedModel, slot: int, one: Prepared, config: TrainConfig, way: str) -> Row:
    budget = config.token_budget
    dev = evaluate_model(model, one.splits["dev"], one.task, token_budget=budget, slot=slot)
    test = evaluate_model(
        model,
        one.splits["test"],
        one.task,
        token_budget=budget,
        slot=slot,
        decoding=dev.decoding,
    )
    return {
        "task": one.task.name,
        "way": way,
        "seed": config.seed,
        "dev": dev.score,
        "test": test.score,
    }


def table(rows: list[Row]) -> Table:
    """Return mean and standard deviation over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    drawn = Table(caption=f"test, mean and standard deviation over {len(seeds)} seeds, in points")
    ways = (ALONE, TOGETHER, APART)
    for header in ("task", *ways):
        drawn.add_column(header, justify="left" if header == "task" else "right")
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = []
        for way in ways:
            values = [100 * r["test"] for r in rows if (r["task"], r["way"]) == (task, way)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        drawn.add_row(task, *cells)
    return drawn


if __name__ == "__main__":
    main()
