"""Each method on each form of task: it learns, is saved, is stopped, is dealt to a team."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptv2_core.artifact import Weights, load_manifest, load_weights, restore_model
from ptv2_core.data.batching import collate
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.evaluation.scoring import logits_of_batch
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from tests.core.training_parts import (
    RATES,
    Bench,
    assert_close,
    assert_equal,
    learner_of,
    of_method,
    save_trained,
    weights,
)

Folder = Callable[[str], Path]

every_method = pytest.mark.parametrize("method", list(RATES))
# one of each form: rows, values, options, tokens, spans
KINDS = ["classification", "regression", "multiple_choice", "tagging", "qa"]
# sums of some 100 fp32 numbers in another order
ATOL = 1e-5


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_methods_learn_each_form(backbone_folder: Folder, kind: str, method: str) -> None:
    bench = Bench(backbone_folder("bert"), kind, rows=(40, 12))
    config = of_method(method, epochs=6, patience=6)
    _, reports = bench.run(config)
    losses = [epoch.train_loss for epoch in reports[-1].history]
    assert len(losses) == 6
    assert losses[-1] < 0.95 * losses[0], losses


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_methods_answer_alike_at_any_width(backbone_folder: Folder, kind: str, method: str) -> None:
    bench = Bench(backbone_folder("bert"), kind, rows=(12, 6))
    model = bench.model(of_method(method)).eval()
    batch = collate(bench.dev, torch.arange(len(bench.dev)).numpy())
    width = batch.input_ids.shape[1]

    def wider(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, 7))

    types = batch.token_type_ids
    with torch.no_grad():
        got = logits_of_batch(model, batch)
        wide = model(
            wider(batch.input_ids), wider(batch.token_mask), None if types is None else wider(types)
        )
    is_read = batch.token_mask if bench.task.form in ("tokens", "spans") else slice(None)
    narrow = wide[:, :width] if bench.task.form in ("tokens", "spans") else wide
    torch.testing.assert_close(narrow[is_read], got[is_read], atol=ATOL, rtol=0.0)
    if bench.task.form == "spans":
        lowest = torch.finfo(torch.float32).min
        assert set(wide[~wider(batch.token_mask)].flatten().tolist()) == {lowest}
        assert got[batch.token_mask].min() > lowest
        # so that a softmax over tokens gives padding nothing
        rules = rules_of("spans")
        again = replace(
            batch, input_ids=wider(batch.input_ids), token_mask=wider(batch.token_mask),
            token_type_ids=None,
        )  # fmt: skip
        assert float(rules.loss(wide, again)) == pytest.approx(
            float(rules.loss(got, batch)), rel=1e-6
        )


@every_method
def test_methods_artifact_gives_the_trained_models_logits(
    backbone_folder: Folder, tmp_path: Path, method: str
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(24, 12))
    config = of_method(method, prompt={"length": 4, "shift_positions": True})
    model, _ = bench.run(config)
    model.eval()
    folder = save_trained(tmp_path / "prompt", model, bench, config)
    manifest = load_manifest(folder)
    assert manifest.method == method
    stored = load_weights(folder, manifest)
    head = {"head.weight", "head.bias"}
    if method == "finetune":
        own = {f"backbone.{name}" for name in bench.backbone.model.state_dict()}
        assert set(stored.named()) == head | own
        assert stored.num_tuned == bench.backbone.spec.num_parameters
    else:
        wanted = {"ptv2": (3, 2, 4, 4, 8), "prompt_tuning": (4, 32)}
        assert set(stored.named()) == head | ({"prompt"} if method in wanted else set())
        assert (stored.prompt is None) == (method == "probe")
        if stored.prompt is not None:
            assert stored.prompt.shape == wanted[method]
        assert stored.num_tuned == {"ptv2": 768, "prompt_tuning": 128, "probe": 0}[method]

    before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
    parts = (bench.task, config.prompt, manifest.head, stored)
    restored = restore_model(bench.backbone, [parts])
    assert_equal(dict(bench.backbone.state_dict()), before)
    batch = collate(bench.dev, torch.arange(len(bench.dev)).numpy())
    predictor = Predictor.load(folder, device="cpu", precision="fp32")
    with torch.no_grad():
        wanted_logits = logits_of_batch(model, batch)
        for one in (restored, predictor.model):
            got = logits_of_batch(one, batch)
            torch.testing.assert_close(got, wanted_logits, atol=1e-6, rtol=0.0)
    for name, tensor in Weights.of(restored).named().items():
        assert torch.equal(tensor, stored.named()[name]), name
    (answer,) = predictor.predict([{"text": "book the flight to rome"}])
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["prompt_tuning", "finetune", "probe"])
def test_methods_stopped_training_goes_on_bitwise_the_same(
    backbone_folder: Folder, tmp_path: Path, method: str
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = of_method(method, prompt={"length": 4, "dropout": 0.2}, head={"dropout": 0.2})
    whole, wanted = bench.run(config)
    file = tmp_path / "checkpoint.safetensors"
    for stop in (2, 5):  # within either epoch
        steps = bench.start(bench.model(config), config, checkpoint=Checkpoint(file, every_steps=1))
        next(report for report in steps if report.step == stop)
        steps.close()  # type: ignore[attr-defined]
    again = bench.model(config)
    reports = list(bench.start(again, config, checkpoint=Checkpoint(file, every_steps=1)))
    assert reports[0].is_resumed
    assert [r.step for r in reports] == [5, 6]
    assert reports[-1] == wanted[-1]
    assert_equal(weights(again), weights(whole))


@pytest.mark.parametrize("method", ["prompt_tuning", "finetune", "probe"])
def test_methods_recompute_their_activations_where_asked(
    backbone_folder: Folder, method: str
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(16, 6))
    config = of_method(method, epochs=1, backbone_dropout=True)
    one, kept = bench.run(config)
    two, again = bench.run(replace(config, gradient_checkpointing=True))
    assert [r.train_loss for r in kept] == [r.train_loss for r in again]
    assert_close(weights(two), weights(one), atol=ATOL)


def test_methods_and_their_products_change_the_fingerprint(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))

    def fingerprint(method: str) -> str:
        config = of_method(method, learning_rate=1e-3)
        return learner_of(bench, bench.model(config), config).fingerprint()

    found = [fingerprint(method) for method in RATES]
    assert found == [fingerprint(method) for method in RATES]
    bench.backbone = load_backbone(
        str(bench.folder), precision="bf16", device="cpu", packs=False, tunable=True
    )
    assert len({*found, fingerprint("finetune")}) == 5


@pytest.mark.parametrize("method", ["prompt_tuning", "probe"])
def test_methods_train_on_a_bf16_backbone(backbone_folder: Folder, method: str) -> None:
    bench = Bench(backbone_folder("bert"), rows=(24, 12))
    config = of_method(method)
    _, wanted = bench.run(config)
    bench.backbone = load_backbone(str(bench.folder), precision="bf16", device="cpu")
    _, reports = bench.run(config)
    for got, given in zip(reports, wanted, strict=True):
        assert got.train_loss == pytest.approx(given.train_loss, abs=0.1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_methods_team_deals_whole_groups_of_options(backbone_folder: Folder, size: int) -> None:
    bench = Bench(backbone_folder("bert"), "record", rows=(21, 6))
    config = of_method("ptv2", batch_size=7, head={"dropout": 0.3})
    model = bench.model(config)
    whole = learner_of(bench, model, config).next_work()
    shares = [
        learner_of(bench, model, config, team=Team(rank=rank, size=size)).next_work()
        for rank in range(size)
    ]
    owners = [set(bench.train.groups[share.batch.rows].tolist()) for share in shares]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 7
    assert {len(one) for one in owners} <= {7 // size, 7 // size + 1}
    rows = sorted(row for share in shares for row in share.batch.rows.tolist())
    assert rows == sorted(whole.batch.rows.tolist())
    assert {share.num_labels for share in shares} == {7}
    # dropout is that of the whole batch, and so are the losses together
    model.train()
    with torch.no_grad():
        (wanted,) = model.answer([whole.part])
        losses = [float(share.loss(*model.answer([share.part]))) for share in shares]
    assert sum(losses) == pytest.approx(float(whole.loss(wanted)), abs=ATOL)
