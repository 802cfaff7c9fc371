"""The diagnosis of a deep prompt, against the layers of a plain BERT written out by hand."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ptv2_core.config import PromptConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.evaluation.diagnosis import (
    LayerFigures,
    diagnose,
    effective_rank,
    root_mean_square,
)
from ptv2_core.model.heads import Reading
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit
from ptv2_core.training.records import TrainReport
from ptv2_core.training.stepping import take_step
from tests.core import oracle
from tests.core.training_parts import Bench, learner_of, of_method, settings
from tests.tiny import encode_for, examples_of, open_backbone, task_of, tiny_model

Folder = Callable[[str], Path]
ROWS = 9
LENGTH = 5


def split_of(folder: Path, *, count: int = ROWS) -> EncodedSplit:
    """Return rows of several lengths."""
    return encode_for(folder, examples_of("classification", count, seed=3), task_of())


def rows_of(split: EncodedSplit, count: int) -> list[list[int]]:
    """Return the first rows, unpadded."""
    return [
        split.input_ids[split.offsets[row] : split.offsets[row + 1]].tolist()
        for row in range(count)
    ]


def states_by_hand(
    model: Any, ids: list[int], prompt: list[Tensor | None]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each layer's queries, keys and values `[T, N, D]` of one unpadded row."""
    found = []
    for depth, layer in enumerate(model.encoder.layer):
        # what the layer reads: what the layers below it give
        below = SimpleNamespace(layer=list(model.encoder.layer)[:depth])
        cut = SimpleNamespace(embeddings=model.embeddings, encoder=below)
        hidden = oracle.encode_row(cut, ids, prompt[:depth], first_position=0, shift=False)
        own = layer.attention.self
        found.append(
            tuple(
                (hidden @ part.weight.T + part.bias).view(len(ids), own.num_attention_heads, -1)
                for part in (own.query, own.key, own.value)
            )
        )
    return found


def by_hand(model: PromptedModel, rows: list[list[int]], *, reads: Reading) -> list[dict[str, Any]]:
    """Return attention by head and the norms of the tokens, with loops over rows and queries."""
    bert: Any = model.backbone.model
    bert.requires_grad_(False)
    prompt = model.bank.flatten(0)
    states = [states_by_hand(bert, ids, list(prompt)) for ids in rows]
    last, heads, size = len(prompt) - 1, prompt.shape[2], prompt.shape[4]
    found = []
    for layer in range(len(prompt)):
        shares: list[list[float]] = [[] for _ in range(heads)]
        for of_row in states:
            query, key, _ = of_row[layer]
            asking = [0] if layer == last and reads in ("cls", "pooler") else range(len(query))
            for head in range(heads):
                for token in asking:
                    keys = [*prompt[layer, 0, head], *key[:, head]]
                    scores = [float(query[token, head] @ k) / math.sqrt(size) for k in keys]
                    weights = [math.exp(score) for score in scores]
                    shares[head].append(sum(weights[:LENGTH]) / sum(weights))
        tokens = [torch.cat([of_row[layer][kind] for of_row in states]) for kind in (1, 2)]
        found.append(
            {
                "heads": [sum(one) / len(one) for one in shares],
                "token_norms": [float((states**2).mean() ** 0.5) for states in tokens],
            }
        )
    return found


def model_of(folder: Path, reads: Reading = "mean", **prompt: Any) -> PromptedModel:
    model = tiny_model(open_backbone(folder), PromptConfig(length=LENGTH, **prompt))
    model.heads[0].reads = reads  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("reads", ["mean", "cls"])
def test_diagnosis_attention_and_norms_are_those_of_the_layers_written_out(
    backbone_folder: Folder, reads: Reading
) -> None:
    folder = backbone_folder("bert")
    split = split_of(folder)
    assert len(set(split.lengths.tolist())) > 3, "there is padding"
    model = model_of(folder, reads, shift_positions=False)
    figures = diagnose(model, split, rows=6, token_budget=10_000)
    assert [one.layer for one in figures] == [0, 1, 2]
    wanted = by_hand(model, rows_of(split, 6), reads=reads)
    for got, expected in zip(figures, wanted, strict=True):
        assert got.head_attention == pytest.approx(expected["heads"], abs=1e-5)
        assert got.attention == pytest.approx(sum(expected["heads"]) / 4, abs=1e-5)
        assert [got.token_key_norm, got.token_value_norm] == pytest.approx(
            expected["token_norms"], rel=1e-4
        )
        assert 0.0 < got.attention < 1.0


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_diagnosis_does_not_depend_on_the_batches(
    backbone_folder: Folder, token_budget: int
) -> None:
    folder = backbone_folder("bert")
    model, split = model_of(folder), split_of(folder)
    one_by_one = diagnose(model, split, token_budget=1)
    for got, wanted in zip(
        diagnose(model, split, token_budget=token_budget), one_by_one, strict=True
    ):
        assert got.head_attention == pytest.approx(wanted.head_attention, abs=1e-5)
        assert got.token_key_norm == pytest.approx(wanted.token_key_norm, rel=1e-5)


def test_diagnosis_reads_the_first_rows_alone(backbone_folder: Folder) -> None:
    folder = backbone_folder("bert")
    model = model_of(folder)
    few = split_of(folder, count=4)
    many = split_of(folder, count=9)
    assert rows_of(few, 4) == rows_of(many, 4)
    assert diagnose(model, many, rows=4, token_budget=99) == diagnose(model, few, token_budget=99)


def test_diagnosis_tells_the_prompt_of_its_own_layers_and_changes_nothing(
    backbone_folder: Folder,
) -> None:
    folder = backbone_folder("bert")
    model = model_of(folder, layers=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    model.train()
    figures = diagnose(model, split_of(folder), token_budget=99)
    assert [one.layer for one in figures] == [1, 2]
    prompt = model.bank.flatten(0)
    for place, got in enumerate(figures):
        keys, values = prompt[place]
        assert got.key_norm == pytest.approx(float((keys**2).mean() ** 0.5))
        assert got.value_norm == pytest.approx(float((values**2).mean() ** 0.5))
        assert got.key_rank == effective_rank(keys)
        assert got.value_rank == effective_rank(values)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not model.training


@pytest.mark.parametrize("method", ["probe", "prompt_tuning", "finetune"])
def test_diagnosis_of_other_methods_is_empty(backbone_folder: Folder, method: str) -> None:
    bench = Bench(backbone_folder("bert"), rows=(20, 12))
    config = of_method(method)
    model = bench.model(config)
    assert diagnose(model, bench.dev, token_budget=99) == ()
    reports = watched(bench, model, config)
    assert reports[-1].start_layers == ()
    assert [record.layers for record in reports[-1].history] == [(), ()]


# Measures


@pytest.mark.parametrize(
    ("singular", "rank"),
    [([1.0, 1.0, 1.0], 3.0), ([2.0, 0.0, 0.0], 1.0), ([3.0, 1.0, 0.0], None), ([0.0] * 3, 0.0)],
)
def test_effective_rank_is_that_of_the_singular_values(
    singular: list[float], rank: float | None
) -> None:
    if rank is None:
        rank = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64))[0]
    matrix = left @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ right.T
    states = matrix.view(3, 2, 4).transpose(0, 1)  # [P, N * D] -> [N, P, D]
    assert effective_rank(states) == pytest.approx(rank, abs=1e-6)


def test_root_mean_square_is_that_of_all_elements() -> None:
    assert root_mean_square(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == 2.5


# Over a training


def watched(
    bench: Bench, model: PromptedModel, config: Any, checkpoint: Checkpoint | None = None
) -> list[TrainReport]:
    """Train to the end with a record of the layers."""
    return list(
        fit(
            model,
            task=bench.task,
            train=bench.train,
            dev=bench.dev,
            config=config,
            checkpoint=checkpoint,
            diagnoses=True,
        )
    )


def test_watch_records_the_start_and_each_epoch(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(epochs=1, prompt={"length": 4, "layers": 2})
    model = bench.model(config)
    start = model.bank.flatten(0).clone()
    first = diagnose(model, bench.dev, token_budget=config.token_budget)
    reports = watched(bench, model, config)
    assert all(report.start_layers == reports[0].start_layers for report in reports)
    for got, figures in zip(reports[0].start_layers, first, strict=True):
        assert_figures(asdict(got), figures)
        assert (got.moved, got.gradient_norm) == (0.0, None)
    (record,) = reports[-1].history
    now = model.bank.flatten(0)
    last = diagnose(model, bench.dev, token_budget=config.token_budget)
    for place, (got, figures) in enumerate(zip(record.layers, last, strict=True)):
        assert_figures(asdict(got), figures)
        change = (now[place] - start[place]).norm() / now[place].norm()
        assert got.moved == pytest.approx(float(change))
        assert 0.0 < got.moved < 1.0


def assert_figures(got: dict[str, Any], figures: LayerFigures) -> None:
    wanted = asdict(figures)
    for name in ("layer", "attention", "key_norm", "value_norm", "key_rank", "value_rank"):
        assert got[name] == wanted[name], name


def test_watch_gradient_norms_are_means_over_the_steps_of_the_unclipped_gradient(
    backbone_folder: Folder,
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    # clipped to almost nothing, and still what autograd gives
    config = settings(epochs=1, max_grad_norm=1e-3, learning_rate=1e-12)
    reports = watched(bench, bench.model(config), config)
    assert len(reports) == 3
    # steps so small change no loss: the same batches, each from the start
    model = bench.model(config)
    learner = learner_of(bench, model, config)
    norms = []
    for _ in reports:
        prompt = model.get_parameter("bank.slots.0.weight")
        work = learner.next_work()
        (logits,) = model.answer([work.part])
        (gradient,) = torch.autograd.grad(work.loss(logits), [prompt])
        norms.append([float(layer.norm()) for layer in gradient])
        take_step(model, [learner])
    found = [layer.gradient_norm for layer in reports[-1].history[0].layers]
    assert found == pytest.approx([sum(of) / 3 for of in zip(*norms, strict=True)], rel=1e-4)
    assert all(norm is not None and norm > 1e-3 for norm in found)


def test_watch_of_an_mlp_has_no_gradient_of_the_prompt(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(20, 12))
    config = settings(prompt={"length": 4, "reparameterization": "mlp", "mlp_hidden": 8})
    reports = watched(bench, bench.model(config), config)
    layers = reports[-1].history[-1].layers
    assert [one.gradient_norm for one in layers] == [None] * 3
    assert all(one.moved > 0.0 for one in layers)


def test_watch_changes_no_training(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(prompt={"length": 4, "dropout": 0.2}, head={"dropout": 0.2})
    plain, wanted = bench.run(config)
    model = bench.model(config)
    reports = watched(bench, model, config)
    assert torch.equal(model.bank.flatten(0), plain.bank.flatten(0))
    assert [r.train_loss for r in reports] == [r.train_loss for r in wanted]
    assert [r.layers for r in wanted[-1].history] == [(), ()]
    assert wanted[-1].start_layers == ()


def test_watch_of_a_training_stopped_after_any_step_ends_the_same(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(prompt={"length": 4, "dropout": 0.2})
    wanted = watched(bench, bench.model(config), config)
    assert len(wanted) == 6
    for step in range(1, 7):
        file = tmp_path / f"{step}.safetensors"
        reports = fit(
            bench.model(config),
            task=bench.task,
            train=bench.train,
            dev=bench.dev,
            config=config,
            checkpoint=Checkpoint(file, every_steps=1),
            diagnoses=True,
        )
        for report in reports:
            if report.step == step:
                break
        reports.close()  # type: ignore[attr-defined]
        again = watched(bench, bench.model(config), config, Checkpoint(file, every_steps=1))
        assert again[0].is_resumed
        assert again[0].step == step
        assert again[-1].start_layers == wanted[-1].start_layers
        assert list(again[-1].history) == list(wanted[-1].history)
        assert all(len(record.layers) == 3 for record in again[-1].history)


def test_watch_does_not_go_on_from_a_training_without_one(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(20, 12))
    config, file = settings(), tmp_path / "checkpoint.safetensors"
    list(bench.start(bench.model(config), config, checkpoint=Checkpoint(file, every_steps=1)))
    reports = watched(bench, bench.model(config), config, Checkpoint(file, every_steps=1))
    assert not reports[0].is_resumed
