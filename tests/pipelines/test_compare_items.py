"""What a test item brings to a score: rows about one text are one item, and the score is kept."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.compare_items import SHARED_TEXT, items_of
from pipelines.compare_stats import score
from ptv2_core.data.encoding import encode_examples
from ptv2_core.data.examples import Example, example_to_mapping
from ptv2_core.data.tasks import TaskKind
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.core.kind_parts import KINDS, kind_examples, kind_task
from tests.tiny import tiny_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny backbone."""
    return tiny_backbone(tmp_path_factory.mktemp("items") / "backbone")


@pytest.mark.parametrize("kind", KINDS)
def test_items_give_the_metric_whatever_the_kind(kind: TaskKind, folder: Path) -> None:
    examples: list[Example] = kind_examples(kind, 12) * 2
    task = kind_task(kind)
    tokenizer = load_tokenizer(locate(str(folder)), words=task.form == "tokens")
    split, _ = encode_examples(examples, tokenizer, task=task, max_length=32, stride=4)
    rules = rules_of(task.form)
    right, chance = list(rules.gold(split, task)), random.Random(0)
    predictions: list[Any] = [
        one if chance.random() < 0.6 else chance.choice(right) for one in right
    ]
    if task.form == "tokens":  # tags of another sentence may be too few
        predictions = [one if chance.random() < 0.6 else ["O"] * len(one) for one in right]
    plain = [example_to_mapping(example) for example in examples]
    items = items_of(predictions, split, task, plain)
    expected = rules.metrics(predictions, split, task)[task.metric]
    assert score(items) == pytest.approx(expected, abs=1e-12)
    key = SHARED_TEXT.get(kind)
    assert len(items.values) == len({str(row[key]) for row in plain} if key else plain)
