"""`python -m benchmarks.stack`: trials that share a forward, against one trial at a time.

Prints trials times steps a second for each K, on RTE's lengths, 32 rows a trial and step. On a
CUDA card small batches leave the card idle, and a stack fills it.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lengths import BATCH_SIZE, sentences
from benchmarks.machine import describe, set_up
from benchmarks.measure import PROMPT_LENGTH
from benchmarks.ours import encoded, task
from benchmarks.shapes import NAMES, backbone_folder, bert_tokenizer
from ptv2_core.config import TrainConfig
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.training.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Result:
    """K trials in one forward.

    Attributes:
        trials: K.
        trial_steps_per_s: Trials times steps a second, the median of the rounds.
        peak_device_bytes: Of tensors on a CUDA card; none elsewhere.
    """

    trials: int
    trial_steps_per_s: float
    peak_device_bytes: int | None


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack", description=__doc__)
    parser.add_argument("--shape", choices=NAMES, default="minilm", help="default: %(default)s")
    parser.add_argument("--trials", default="1,4", help="values of K; default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    given = parser.parse_args()
    set_up(threads=given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = backbone_folder(given.shape, Path(scratch))
        results = [
            measure(folder, int(trials), steps=given.steps, rounds=given.rounds)
            for trials in given.trials.split(",")
        ]
    Console().print(table(given.shape, results))
    if given.json is not None:
        stacks = [asdict(result) for result in results]
        write_json_atomic(
            given.json, {"shape": given.shape, "machine": describe(), "stacks": stacks}
        )


def measure(folder: Path, trials: int, *, steps: int, rounds: int) -> Result:
    """Time the steps of so many trials, each with a learning rate of its own.

    Args:
        folder: Of the backbone.
        trials: K.
        steps: A round.
        rounds: After one to warm up.
    """
    backbone = load_backbone(str(folder))
    # one row more than the steps read, so that no epoch ends among them
    count = BATCH_SIZE * steps * (rounds + 1) + 1
    rows = encoded(sentences("rte", count, bert_tokenizer()))
    stack = Stack(backbone, task=task(), train=rows, dev=rows)
    for lane in range(trials):
        changes = {"prompt": {"length": PROMPT_LENGTH}, "learning_rate": 1e-2 / (lane + 1)}
        stack.start(lane, TrainConfig.from_mapping({**changes, "batch_size": BATCH_SIZE}))
    on_card = backbone.device.type == "cuda"
    rates = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(steps):
            stack.advance()
        if on_card:
            torch.cuda.synchronize()
        rates.append(trials * steps / (time.perf_counter() - started))
    return Result(
        trials=trials,
        trial_steps_per_s=statistics.median(rates[1:]),
        peak_device_bytes=torch.cuda.max_memory_allocated() if on_card else None,
    )


def table(shape: str, results: list[Result]) -> Table:
    """Return the results with ratios against the first."""
    machine = describe()
    caption = f"{shape}; {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}"
    drawn = Table(caption=caption)
    for header in ("trials in one forward", "trial steps / s", "ratio", "peak MB on the card"):
        drawn.add_column(header, justify="right")
    for result in results:
        peak = result.peak_device_bytes
        drawn.add_row(
            str(result.trials),
            f"{result.trial_steps_per_s:.2f}",
            f"{result.trial_steps_per_s / results[0].trial_steps_per_s:.2f}x",
            "" if peak is None else f"{peak / 1e6:,.0f}",
        )
    return drawn


if __name__ == "__main__":
    main()
