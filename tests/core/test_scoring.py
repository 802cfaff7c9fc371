"""Scoring is the same for every kind, alone and in a team."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptv2_core.config import PromptConfig
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.tasks import TaskKind
from ptv2_core.evaluation.scoring import (
    Evaluation,
    evaluate_model,
    gold_labels,
    score_predictions,
)
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team
from tests.core.kind_parts import KINDS, kind_examples, kind_task
from tests.tiny import open_backbone, tiny_model

Folder = Callable[[str], Path]


class Partner(Team):
    """One of two processes that adds what the other one had."""

    def __init__(self, rank: int, other: Tensor | None = None) -> None:
        super().__init__(rank=rank, size=2)
        object.__setattr__(self, "other", other)
        object.__setattr__(self, "own", None)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        (one,) = tensors
        object.__setattr__(self, "own", one.clone())
        if self.other is not None:  # type: ignore[attr-defined]
            one += self.other  # type: ignore[attr-defined]


@pytest.fixture
def parts(backbone_folder: Folder) -> Callable[[TaskKind], tuple[PromptedModel, EncodedSplit]]:
    folder = backbone_folder("bert")

    def of(kind: TaskKind) -> tuple[PromptedModel, EncodedSplit]:
        task = kind_task(kind)
        tokenizer = load_tokenizer(locate(str(folder)))
        examples = kind_examples(kind, 12)
        split, _ = encode_examples(examples, tokenizer, task=task, max_length=16, stride=2)
        return tiny_model(open_backbone(folder), PromptConfig(length=3), task=task), split

    return of


Parts = Callable[[TaskKind], tuple[PromptedModel, EncodedSplit]]


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_does_not_depend_on_batches_or_processes(kind: TaskKind, parts: Parts) -> None:
    model, split = parts(kind)
    task = kind_task(kind)

    def scored(budget: int, team: Team | None = None) -> Evaluation:
        return evaluate_model(model, split, task, token_budget=budget, team=team)

    whole = scored(100_000)
    assert task.metric in whole.metrics
    assert whole.score == whole.metrics[task.metric]
    second = Partner(1)
    scored(60, second)
    for other in (scored(60), scored(60, Partner(0, second.own))):  # type: ignore[attr-defined]
        if kind == "regression":
            assert other.predictions == pytest.approx(whole.predictions, abs=1e-5)
        else:
            assert list(other.predictions) == list(whole.predictions)
        assert other.loss == pytest.approx(whole.loss, rel=1e-4)
        assert other.metrics == pytest.approx(whole.metrics, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_of_the_splits_own_answers_is_perfect(kind: TaskKind, parts: Parts) -> None:
    _, split = parts(kind)
    task = kind_task(kind)
    gold = gold_labels(split, task)
    assert len(gold) == (len(split) if kind == "multirc" else split.num_groups)
    metrics = score_predictions(gold, split, task)
    assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0))


def test_scoring_uses_the_decoding_it_is_given(parts: Parts) -> None:
    model, split = parts("qa")
    task = kind_task("qa")
    chosen = evaluate_model(model, split, task, token_budget=500)
    assert set(chosen.decoding) == {"null_threshold"}
    for threshold, is_answered in ((-1e9, False), (1e9, True)):
        given = {"null_threshold": threshold}
        found = evaluate_model(model, split, task, token_budget=500, decoding=given)
        assert found.decoding == given
        assert all(bool(text) == is_answered for text in found.predictions)
        assert found.score <= chosen.score
        assert found.loss == chosen.loss


def test_scoring_leaves_the_loss_of_options_without_a_right_one_finite(parts: Parts) -> None:
    model, split = parts("record")
    split.labels[:] = 0
    found = evaluate_model(model, split, kind_task("record"), token_budget=500)
    assert found.loss == 0.0
    assert torch.isfinite(torch.tensor(found.score))
