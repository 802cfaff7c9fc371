"""fit(): what changes, what does not, and when it stops."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptv2_core.config import TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError, TrainingError
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.fit import fit
from ptv2_core.training.learner import Learner
from ptv2_core.training.records import TrainReport
from ptv2_core.training.sources import Source
from ptv2_core.training.start import check_positions, new_model
from tests.core.training_parts import settings
from tests.tiny import (
    encode_for,
    examples_of,
    open_backbone,
    task_of,
    tiny_backbone,
    without_pooler,
)

Folder = Callable[[str], Path]


def build(
    folder: Path, kind: str, config: TrainConfig
) -> tuple[PromptedModel, TaskSpec, list[EncodedSplit]]:
    """Return a new model, its task, and train and dev rows."""
    task = task_of(kind)
    train, dev = (
        encode_for(folder, examples_of(kind, count, seed=count), task) for count in (60, 24)
    )
    return new_model(open_backbone(folder), task, config, train), task, [train, dev]


def run(folder: Path, kind: str, config: TrainConfig) -> tuple[PromptedModel, list[TrainReport]]:
    """Train to the end."""
    model, task, (train, dev) = build(folder, kind, config)
    return model, list(fit(model, task=task, train=train, dev=dev, config=config))


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_fit_after_an_evaluation_trains_prompt_and_head_and_no_backbone_tensor(
    backbone_folder: Folder, kind: str
) -> None:
    model, task, (train, dev) = build(backbone_folder("bert"), kind, settings(batch_size=32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reports = fit(model, task=task, train=train, dev=dev, config=settings(batch_size=32))
    first = next(report for report in reports if report.evaluation is not None)
    assert first.epoch == 1
    after_evaluation = {name: p.detach().clone() for name, p in model.trainable()}
    next(reports)
    next(reports)
    for name, parameter in model.trainable():
        assert not torch.equal(parameter, before[name]), name
        assert not torch.equal(parameter, after_evaluation[name]), name
    frozen = [name for name in before if name.startswith("backbone.")]
    assert len(frozen) > 50
    for name in frozen:
        assert torch.equal(model.state_dict()[name], before[name]), name


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_fit_same_seed_gives_the_same_losses_and_weights(
    backbone_folder: Folder, kind: str
) -> None:
    config = settings(prompt={"length": 4, "dropout": 0.2}, head={"dropout": 0.1})
    first, first_reports = run(backbone_folder("bert"), kind, config)
    torch.manual_seed(99)
    second, second_reports = run(backbone_folder("bert"), kind, config)
    assert [r.train_loss for r in first_reports] == [r.train_loss for r in second_reports]
    for (name, one), (_, other) in zip(first.trainable(), second.trainable(), strict=True):
        assert torch.equal(one, other), name
    _, other_seed = run(
        backbone_folder("bert"), kind, TrainConfig.from_mapping({**config.to_mapping(), "seed": 7})
    )
    assert [r.train_loss for r in other_seed] != [r.train_loss for r in first_reports]


def test_fit_draws_dropout_anew_for_each_step_and_never_for_the_same(
    backbone_folder: Folder,
) -> None:
    config = settings(prompt={"length": 4, "dropout": 0.5}, head={"dropout": 0.5}, epochs=1)

    def keeps() -> list[torch.Tensor]:
        model, task, (train, dev) = build(backbone_folder("bert"), "classification", config)
        source = Source(slot=0, task=task, train=train, dev=dev)
        learner = Learner(model, [source], config=config)
        found: list[torch.Tensor] = []
        for step in range(4):
            learner.step = step
            part = learner.next_work().part
            assert part.prompt_keep is not None
            assert part.head_keep is not None
            found += [part.prompt_keep, part.head_keep]
        return found

    first, second = keeps(), keeps()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert set(one.flatten().tolist()) == {0.0, 2.0}
    assert len({tuple(keep.flatten().tolist()) for keep in first}) == 8


def test_fit_leaves_the_global_random_state_alone(backbone_folder: Folder) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(backbone_folder("bert"), "classification", settings(prompt={"length": 4, "dropout": 0.2}))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["classification", "tagging"])
@pytest.mark.parametrize("reparameterization", ["embedding", "mlp"])
@pytest.mark.parametrize("start", ["normal", "backbone"])
def test_fit_learns_a_learnable_task(
    backbone_folder: Folder, kind: str, reparameterization: str, start: str
) -> None:
    prompt = {
        "length": 4,
        "reparameterization": reparameterization,
        "mlp_hidden": 16,
        "start": start,
    }
    config = settings(prompt=prompt, epochs=24, learning_rate=5e-2, patience=24)
    _, reports = run(backbone_folder("bert"), kind, config)
    scores = [r.evaluation.score for r in reports if r.evaluation is not None]
    assert len(scores) == 24
    # 60 rows teach a random backbone labels, and some of the spans; untrained it finds none
    assert max(scores) > (0.9 if kind == "classification" else 0.4)


def test_fit_leaves_the_best_epochs_weights(backbone_folder: Folder) -> None:
    config = settings(epochs=5, learning_rate=0.3)
    model, task, (train, dev) = build(backbone_folder("bert"), "classification", config)
    best: dict[str, torch.Tensor] = {}
    for report in fit(model, task=task, train=train, dev=dev, config=config):
        if report.is_best:
            best = {name: p.detach().clone() for name, p in model.trainable()}
    assert best
    for name, parameter in model.trainable():
        assert torch.equal(parameter, best[name]), name


def test_fit_stops_when_neither_score_nor_loss_gets_better(backbone_folder: Folder) -> None:
    config = settings(epochs=40, patience=2, learning_rate=1e-12)
    _, reports = run(backbone_folder("bert"), "classification", config)
    evaluated = [r for r in reports if r.evaluation is not None]
    # weights that do not move leave score and loss where epoch 1 found them
    assert evaluated[-1].epoch < 10
    assert not any(r.is_best for r in evaluated[-2:])


def test_fit_refuses_a_loss_that_is_not_finite_before_the_step(backbone_folder: Folder) -> None:
    model, task, (train, dev) = build(backbone_folder("bert"), "classification", settings())
    with torch.no_grad():
        model.bank.slots[0].weight[0, 0, 0, 0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.trainable()}
    with pytest.raises(TrainingError, match=r"loss nan.*step 1 \(epoch 1\)"):
        list(fit(model, task=task, train=train, dev=dev, config=settings()))
    for name, parameter in model.trainable():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(before[name])), name


def test_fit_reports_the_scheduled_learning_rate(backbone_folder: Folder) -> None:
    config = settings(epochs=3, warmup_fraction=0.25)
    _, reports = run(backbone_folder("bert"), "classification", config)
    total = reports[0].total_steps
    assert total == len(reports)
    warmup = round(0.25 * total)
    for report in reports:
        step = report.step - 1
        factor = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
        assert report.learning_rate == pytest.approx(1e-2 * factor, rel=1e-12)


def test_start_refuses_a_prompt_longer_than_the_positions(backbone_folder: Folder) -> None:
    folder = backbone_folder("roberta")
    backbone = open_backbone(folder)
    split = encode_for(folder, examples_of("classification", 9), task_of())
    longest = int(split.lengths.max())

    def length_of(length: int, **changes: object) -> TrainConfig:
        return settings(prompt={"length": length, **changes})

    fitting = 64 - 1 - longest  # one position is lost to the padding id
    check_positions(backbone, length_of(fitting), [split])
    with pytest.raises(ConfigError, match=f"expected a length of at most {fitting}"):
        check_positions(backbone, length_of(fitting + 1), [split])
    # neither takes a position: the tokens stay where the backbone has them
    check_positions(backbone, length_of(60, shift_positions=False), [split])
    check_positions(backbone, length_of(60, layers=2), [split])


def test_start_refuses_to_read_a_pooler_that_is_not_there(tmp_path: Path) -> None:
    folder = without_pooler(tiny_backbone(tmp_path / "bert"))
    task = task_of()
    split = encode_for(folder, examples_of("classification", 9), task)
    config = settings(head={"reads": "pooler"})
    with pytest.raises(ConfigError, match="has no trained pooler"):
        new_model(open_backbone(folder), task, config, split)
