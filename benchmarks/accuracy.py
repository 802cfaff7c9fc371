"""`python -m benchmarks.accuracy`: does speed cost accuracy?

Trains RTE, CB and SNIPS slots with MiniLM, three seeds each, in three ways: frozen weights in bf16
without dropout in the backbone, which is what we do; the same in fp32; the same with dropout.
Every training is written down as it ends, so that a run that was stopped goes on.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data import load_task
from ptv2_core.config import Precision, TrainConfig
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.training.fit import fit
from ptv2_core.training.start import new_model

BACKBONE = "all-minilm-l6-v2"
SEEDS = (1, 2, 3)
TOKEN_BUDGET = 8192


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of computing the same training.

    Attributes:
        name: For the table.
        precision: Of the frozen weights.
        dropout: Whether the backbone drops out.
    """

    name: str
    precision: Precision
    dropout: bool


WAYS = (
    Way(name="bf16, no backbone dropout", precision="bf16", dropout=False),
    Way(name="fp32, no backbone dropout", precision="fp32", dropout=False),
    Way(name="bf16, backbone dropout", precision="bf16", dropout=True),
)
# rows of train at most, and the settings, chosen once on dev in bf16 and the same for all ways
TASKS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "cb": (None, {"prompt": {"length": 16}, "learning_rate": 1e-2, "epochs": 15}),
    "snips": (2000, {"prompt": {"length": 32}, "learning_rate": 2e-2, "epochs": 8}),
    "rte": (None, {"prompt": {"length": 16}, "learning_rate": 1e-2, "epochs": 3}),
}


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the scores are kept")
    arguments = parser.parse_args()
    file: Path = arguments.json
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    done = {(row["task"], row["way"], row["seed"]) for row in rows}
    for task in TASKS:
        for seed in SEEDS:
            for way in WAYS:
                if (task, way.name, seed) not in done:
                    rows.append(train(task, way, seed))
                    write_json_atomic(file, rows)
    Console(width=110).print(table(rows))


def train(name: str, way: Way, seed: int) -> dict[str, Any]:
    """Train once; returns scores on dev and test and the seconds it took."""
    max_rows, changes = TASKS[name]
    task, splits = load_task(name, backbone=BACKBONE, max_rows=max_rows)
    settings = {**changes, "seed": seed, "backbone_dropout": way.dropout, "patience": 100}
    config = TrainConfig.from_mapping(settings)
    backbone = load_backbone(BACKBONE, precision=way.precision)
    model = new_model(backbone, task, config, splits["train"])
    started = time.monotonic()
    *_, last = fit(model, task=task, train=splits["train"], dev=splits["dev"], config=config)
    seconds = time.monotonic() - started
    test = evaluate_model(model, splits["test"], task, token_budget=TOKEN_BUDGET)
    return {
        "task": name,
        "way": way.name,
        "seed": seed,
        "dev": max(record.dev_score for record in last.history),
        "test": test.score,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Return mean and standard deviation over the seeds."""
    drawn = Table(caption="mean and standard deviation over 3 seeds, in points")
    for header in ("task", "way", "dev", "test", "seconds"):
        drawn.add_column(header, justify="left" if header in ("task", "way") else "right")
    for task in TASKS:
        for way in WAYS:
            own = [row for row in rows if (row["task"], row["way"]) == (task, way.name)]
            if not own:
                continue
            cells = [_mean_and_spread([100 * row[key] for row in own]) for key in ("dev", "test")]
            seconds = f"{statistics.mean(row['seconds'] for row in own):.0f}"
            drawn.add_row(task, way.name, *cells, seconds)
    return drawn


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


if __name__ == "__main__":
    main()
