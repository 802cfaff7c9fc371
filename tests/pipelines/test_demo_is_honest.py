"""The demo on the real backbone: a prompt does what no linear probe does, a wrong one does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.auto import resolved
from pipelines.sources import demo
from ptv2_core.config import TrainConfig
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import Record, collect_labels
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import parse_records
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.training.fit import fit
from ptv2_core.training.probe import probe
from ptv2_core.training.start import new_model, reading_of

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = "all-minilm-l6-v2"

TASKS: dict[str, tuple[Any, Fields]] = {
    "intents": ("classification", Fields(text="text", label="label")),
    "entailment": (
        "classification",
        Fields(text="premise", text_pair="hypothesis", label="label"),
    ),
    "slots": ("tagging", Fields(tokens="tokens", tags="tags")),
}


def encoded(name: str) -> tuple[TaskSpec, list[EncodedSplit]]:
    """Return a demo task and its encoded train, dev and test."""
    kind, fields = TASKS[name]
    splits = {
        split: parse_records(
            [Record(where=f"{split}:{n}", values=row) for n, row in enumerate(rows)],
            kind=kind,
            fields=fields,
        )[0]
        for split, rows in demo.generate(ROOT / "demo" / f"{name}.toml").items()
    }
    labels = collect_labels(splits, kind=kind)
    task = TaskSpec(
        name=name, kind=kind, labels=labels, fields=fields.named(), metric=METRICS[kind]
    )
    tokenizer = load_tokenizer(locate(BACKBONE))
    return task, [
        encode_examples(splits[split], tokenizer, task=task, max_length=128)[0]
        for split in ("train", "dev", "test")
    ]


@pytest.mark.long  # the three together
@pytest.mark.parametrize(
    ("name", "epochs", "wrong_at_most"),
    [("intents", 2, 0.5), ("entailment", 5, 0.7), ("slots", 4, 0.4)],
)
def test_demo_needs_the_right_prompt(name: str, epochs: int, wrong_at_most: float) -> None:
    task, splits = encoded(name)
    config = TrainConfig.from_mapping(resolved({"epochs": epochs}, task.kind))
    backbone = load_backbone(BACKBONE, device="cpu")
    model = new_model(backbone, task, config, splits[0])
    bare = probe(
        model,
        task=task,
        splits=splits,
        reads=reading_of(task, config.head, backbone),
        token_budget=8192,
    )
    for _ in fit(model, task=task, train=splits[0], dev=splits[1], config=config):
        pass
    tuned = evaluate_model(model, splits[2], task, token_budget=8192).score
    assert tuned > bare.test.score + 0.2
    prompt = model.bank.slots[0].weight
    with torch.no_grad():
        prompt.copy_(torch.randn(prompt.shape, generator=torch.Generator().manual_seed(7)))
    assert evaluate_model(model, splits[2], task, token_budget=8192).score < wrong_at_most
