"""A training that begins from a prompt which was trained before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptv2_core.artifact import Weights, load_manifest, load_weights
from ptv2_core.data.batching import collate
from ptv2_core.errors import ConfigError
from ptv2_core.evaluation.scoring import evaluate_model, logits_of_batch
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit_together
from ptv2_core.training.learner import Learner
from ptv2_core.training.sources import Source
from ptv2_core.training.start import Start, new_model, new_slot
from tests.core.shared_parts import SharedBench
from tests.core.training_parts import (
    Bench,
    assert_equal,
    save_trained,
    settings,
)

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def shared(backbone_folder: Folder) -> SharedBench:
    """Return two tasks on a tiny BERT."""
    return SharedBench(backbone_folder("bert"))


def trained(model: PromptedModel) -> dict[str, Tensor]:
    """Return copies of all that is trained; the prompt once."""
    return {name: parameter.detach().clone() for name, parameter in model.trainable()}


def linear_of(model: PromptedModel, slot: int = 0) -> nn.Linear:
    """Return the linear layer of a slot's head."""
    linear = model.heads[slot].linear
    assert isinstance(linear, nn.Linear)
    return linear


def start_of(
    model: PromptedModel, slot: int = 0, *, head: bool = True, digest: str = "sha256:0"
) -> Start:
    """Return what a training begins with that takes over a slot."""
    weights = Weights.of(model, slot)
    assert weights.prompt is not None
    return Start(
        prompt=weights.prompt,
        digest=digest,
        head=(weights.head_weight, weights.head_bias) if head else None,
    )


def test_start_takes_prompt_and_head_over(shared: SharedBench) -> None:
    config = settings()
    model, _ = shared.run(config)
    for slot, source in enumerate(shared.sources):
        start = start_of(model, slot)
        own = new_model(shared.backbone, source.task, config, source.train, start=start)
        assert torch.equal(own.bank.flatten(0), start.prompt)
        assert start.head is not None
        assert torch.equal(linear_of(own).weight, start.head[0])
        assert torch.equal(linear_of(own).bias, start.head[1])
        batch = collate(source.dev, np.arange(12))
        with torch.no_grad():
            got, wanted = (
                logits_of_batch(model, batch, slot=slot), logits_of_batch(own, batch),
            )  # fmt: skip
        assert torch.equal(got, wanted)
        # the prompt it began from is no part of the training
        before = start.prompt.clone()
        list(fit_together(own, [replace(source, slot=0)], config=config))
        assert torch.equal(start.prompt, before)
        assert not torch.equal(own.bank.flatten(0), before)


def test_start_makes_a_new_head_where_the_old_one_does_not_fit(shared: SharedBench) -> None:
    config = settings()
    model, _ = shared.run(config)
    source = shared.sources[1]
    _, anew = new_slot(shared.backbone, source.task, config, source.train)
    for start in (start_of(model, 0), start_of(model, 1, head=False)):
        prompt, head = new_slot(shared.backbone, source.task, config, source.train, start=start)
        assert torch.equal(prompt(), start.prompt)
        assert torch.equal(head.linear.weight, anew.linear.weight)
        assert torch.equal(head.linear.bias, anew.linear.bias)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"length": 5}, r"expected a prompt of 3 layers and length 5 .* got 3 layers and length 4"),
        ({"length": 4, "layers": 2}, r"expected a prompt of 2 layers and length 4 .* got 3 layers"),
        (
            {"length": 4, "reparameterization": "mlp"},
            r"not the MLP that made them; expected train\.prompt\.reparameterization: embedding",
        ),
    ],
)
def test_start_refuses_a_prompt_that_does_not_fit(
    shared: SharedBench, prompt: dict[str, Any], message: str
) -> None:
    start = start_of(shared.model(settings()))
    source = shared.sources[0]
    with pytest.raises(ConfigError, match=rf"train\.init_from: .*{message}"):
        new_slot(shared.backbone, source.task, settings(prompt=prompt), source.train, start=start)


def test_start_from_an_mlps_prompt_is_what_it_produced(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(24, 12))
    mlp = settings(prompt={"length": 4, "layers": 2, "reparameterization": "mlp", "mlp_hidden": 8})
    model, _ = bench.run(mlp)
    folder = save_trained(tmp_path / "prompt", model, bench, mlp)
    manifest = load_manifest(folder)
    weights = load_weights(folder, manifest)
    assert weights.prompt is not None
    start = Start(
        prompt=weights.prompt,
        digest=manifest.sha256,
        head=(weights.head_weight, weights.head_bias),
    )
    config = settings(prompt={"length": 4, "layers": 2})
    own = new_model(bench.backbone, bench.task, config, bench.train, start=start)
    budget = config.token_budget
    got, wanted = (
        evaluate_model(one, bench.dev, bench.task, token_budget=budget) for one in (own, model)
    )
    assert got.predictions == wanted.predictions
    assert got.loss == pytest.approx(wanted.loss, abs=1e-6)


def test_start_changes_the_fingerprint_and_another_starts_checkpoint_is_left(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings()
    first, _ = bench.run(config)
    second, _ = bench.run(replace(config, seed=7))
    starts = [None, start_of(first), start_of(first, head=False), start_of(second)]

    def begun(start: Start | None) -> PromptedModel:
        return new_model(bench.backbone, bench.task, config, bench.train, start=start)

    source = Source(slot=0, task=bench.task, train=bench.train, dev=bench.dev)
    prints = [Learner(begun(s), [source], config=config).fingerprint() for s in starts]
    assert len(set(prints)) == len(prints)
    assert prints[1] == Learner(begun(starts[1]), [source], config=config).fingerprint()

    file = tmp_path / "checkpoint.safetensors"
    steps = bench.start(begun(starts[1]), config, checkpoint=Checkpoint(file, every_steps=1))
    next(report for report in steps if report.step == 3)
    steps.close()  # type: ignore[attr-defined]
    model = begun(starts[3])
    wanted = list(bench.start(model, config))
    again = begun(starts[3])
    reports = list(bench.start(again, config, checkpoint=Checkpoint(file, every_steps=99)))
    assert not reports[0].is_resumed
    assert reports == wanted
    assert_equal(trained(again), trained(model))
