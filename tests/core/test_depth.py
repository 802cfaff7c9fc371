"""Prompts in some layers only: the states they give, their gradients, and what is saved."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from ptv2_core.artifact import (
    Weights,
    load_manifest,
    load_weights,
    restore_model,
    save_artifact,
)
from ptv2_core.config import HeadConfig, PromptConfig, PromptLayers, TrainConfig
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.heads import LinearHead, Reading
from ptv2_core.model.prompted import Part, PromptedModel
from ptv2_core.model.prompts import NO_SLOT, PromptBank, make_prompt
from ptv2_core.training.start import new_model
from tests.core.oracle import encode_row
from tests.core.training_parts import (
    Bench,
    assert_close,
    assert_equal,
    backward,
    epoch_rows,
    gradients,
    padded,
    settings,
    weights,
)
from tests.tiny import MODELS, open_backbone, task_of, tiny_model

Folder = Callable[[str], Path]
Loaded = Callable[[str], tuple[Backbone, Any]]

ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 3], [2, 9, 9, 3]]
LENGTH = 5
# what `layers` is set to, and which of the three layers that means
DEPTHS: list[tuple[PromptLayers, list[int]]] = [
    ("all", [0, 1, 2]),
    (2, [1, 2]),
    ((0, 2), [0, 2]),
    ((1,), [1]),
]
depths = pytest.mark.parametrize(("layers", "indices"), DEPTHS, ids=[str(one) for one, _ in DEPTHS])
every_model = pytest.mark.parametrize("model_type", sorted(MODELS))


@pytest.fixture(scope="module")
def loaded(backbone_folder: Folder) -> Loaded:
    """Return a function from a model type to its backbone, ours and Transformers' own."""
    made: dict[str, tuple[Backbone, Any]] = {}

    def load(model_type: str) -> tuple[Backbone, Any]:
        if model_type not in made:
            folder = backbone_folder(model_type)
            made[model_type] = (open_backbone(folder), AutoModel.from_pretrained(folder))
        return made[model_type]

    return load


def first_position(model_type: str) -> int:
    """Return the position of a row's first token, with padding id 0."""
    return 1 if model_type in ("roberta", "xlm-roberta", "camembert") else 0


def by_layer(prompt: Tensor, indices: list[int]) -> list[Tensor | None]:
    """Spread `[its layers, 2, N, P, D]` over the three layers."""
    spread: list[Tensor | None] = [None, None, None]
    for place, index in enumerate(indices):
        spread[index] = prompt[place]
    return spread


def with_head(backbone: Backbone, prompt: PromptConfig, *readings: Reading) -> PromptedModel:
    """Return a model with a slot of `prompt` for each of the readings."""
    shape = backbone.spec.shape
    slots = [(make_prompt(shape, prompt, seed=k), prompt) for k in range(len(readings))]
    heads = [
        LinearHead(backbone.spec.hidden_size, 3, reads=reads, seed=k)
        for k, reads in enumerate(readings)
    ]
    return PromptedModel(backbone, PromptBank(shape, slots), heads)


# States


@pytest.mark.parametrize("shift", [True, False])
@depths
@every_model
def test_depth_states_equal_written_out_attention(
    loaded: Loaded,
    model_type: str,
    layers: PromptLayers,
    indices: list[int],
    shift: bool,
) -> None:
    backbone, plain = loaded(model_type)
    model = tiny_model(backbone, PromptConfig(length=LENGTH, layers=layers, shift_positions=shift))
    prompts = by_layer(model.bank.flatten(0), indices)
    with torch.no_grad():
        got = model.encode(*padded(ROWS)).hidden
        for row, states in zip(ROWS, got, strict=True):
            wanted = encode_row(
                plain,
                row,
                prompts,
                first_position=first_position(model_type),
                shift=shift and 0 in indices,
            )
            torch.testing.assert_close(states[: len(row)], wanted, atol=1e-5, rtol=1e-5)


@depths
def test_depth_parameter_count_is_its_formula(
    loaded: Loaded, layers: PromptLayers, indices: list[int]
) -> None:
    backbone, _ = loaded("bert")
    model = tiny_model(backbone, PromptConfig(length=LENGTH, layers=layers), classes=(4,))
    heads, size, hidden, classes = 4, 8, 32, 4
    count = sum(parameter.numel() for _, parameter in model.trainable())
    assert count == 2 * len(indices) * LENGTH * heads * size + classes * hidden + classes
    assert model.bank.flatten(0).shape == (len(indices), 2, heads, LENGTH, size)
    assert model.bank.layers(0) == tuple(indices)
    assert model.bank.first_layer(0) == indices[0]


@depths
def test_depth_mlp_has_an_output_for_its_own_layers_alone(
    backbone_folder: Folder, layers: PromptLayers, indices: list[int]
) -> None:
    config = PromptConfig(length=LENGTH, layers=layers, reparameterization="mlp", mlp_hidden=16)
    model = tiny_model(open_backbone(backbone_folder("bert")), config, classes=(4,))
    width, inner, outer = 32, 16, 2 * len(indices) * 32
    count = sum(p.numel() for name, p in model.trainable() if name.startswith("bank."))
    assert count == LENGTH * width + (width + 1) * inner + (inner + 1) * outer
    flat = tiny_model(model.backbone, PromptConfig(length=LENGTH, layers=layers))
    flat.heads = model.heads
    with torch.no_grad():
        dict(flat.trainable())["bank.slots.0.weight"].copy_(model.bank.flatten(0))
        assert torch.equal(model(*padded(ROWS)), flat(*padded(ROWS)))


def test_depth_prompt_from_the_backbone_takes_its_own_layers(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    # the words that it is sampled from stand where the prompt leaves them
    own = {"length": 4, "start": "backbone", "shift_positions": False}
    every = bench.model(settings(prompt=own))
    for layers, indices in DEPTHS:
        value = list(layers) if isinstance(layers, tuple) else layers
        some = bench.model(settings(prompt={**own, "layers": value}))
        assert torch.equal(some.bank.flatten(0), every.bank.flatten(0)[indices])


@depths
@every_model
def test_depth_tokens_below_the_first_prompt_are_where_the_backbone_has_them(
    loaded: Loaded, model_type: str, layers: PromptLayers, indices: list[int]
) -> None:
    backbone, plain = loaded(model_type)
    model = tiny_model(backbone, PromptConfig(length=LENGTH, layers=layers))
    ids, mask = padded(ROWS)
    seen: list[Tensor] = []
    encoder: Any = model.backbone.model.encoder
    hook = encoder.layer[indices[0]].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    moved = LENGTH if indices[0] == 0 else 0
    with torch.no_grad():
        model.encode(ids, mask)
        places = torch.arange(ids.shape[1]) + first_position(model_type) + moved
        wanted = plain(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=places.expand_as(ids),
            output_hidden_states=True,
        ).hidden_states[indices[0]]
    hook.remove()
    torch.testing.assert_close(seen[0][mask], wanted[mask], atol=1e-5, rtol=1e-5)
    assert model.bank.shift(0) == moved


@every_model
def test_depth_mixed_batch_equals_separate_forwards(
    backbone_folder: Folder, model_type: str
) -> None:
    prompts = [
        PromptConfig(length=3, layers=2),
        PromptConfig(length=9, layers=(0, 2)),
        PromptConfig(length=5, shift_positions=False),
        PromptConfig(length=6, layers=(1,), reparameterization="mlp", mlp_hidden=8),
        PromptConfig(length=2, layers=(0,)),
    ]
    model = tiny_model(
        open_backbone(backbone_folder(model_type)), *prompts, classes=(2, 3, 5, 4, 3)
    )
    slots = [2, 0, NO_SLOT, 1, 3, 4, 1, NO_SLOT]
    rows = [*ROWS, *ROWS[::-1]]
    with torch.no_grad():
        mixed = model.mixed(*padded(rows), slots=torch.tensor(slots))
        for row, slot, got in zip(rows, slots, mixed, strict=True):
            alone = padded([row])
            if slot == NO_SLOT:
                got = got[: len(row)]
                wanted = model.encode(*alone, slots=NO_SLOT).hidden[0]
            else:
                wanted = model(*alone, slot=slot)[0]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# Gradients


@depths
@every_model
def test_depth_gradients_equal_those_of_written_out_attention(
    loaded: Loaded, model_type: str, layers: PromptLayers, indices: list[int]
) -> None:
    backbone, plain = loaded(model_type)
    model = tiny_model(backbone, PromptConfig(length=LENGTH, layers=layers))
    ids, mask = padded(ROWS)
    weighing = torch.randn(ids.shape[1], 32, generator=torch.Generator().manual_seed(1))
    hidden = model.encode(ids, mask).hidden
    backward((hidden * weighing * mask[:, :, None]).sum())
    got = dict(model.trainable())["bank.slots.0.weight"].grad
    assert got is not None
    prompt = model.bank.flatten(0).requires_grad_()
    total = torch.zeros(())
    for row in ROWS:
        states = encode_row(
            plain,
            row,
            by_layer(prompt, indices),
            first_position=first_position(model_type),
            shift=0 in indices,
        )
        total = total + (states * weighing[: len(row)]).sum()
    (wanted,) = torch.autograd.grad(total, prompt)
    assert got.shape[0] == len(indices)
    assert (got.abs().amax(dim=(1, 2, 3, 4)) > 1e-3).all()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_depth_gradient_reaches_the_slots_of_the_batch_alone(backbone_folder: Folder) -> None:
    model = tiny_model(
        open_backbone(backbone_folder("bert")),
        PromptConfig(length=3, layers=2),
        PromptConfig(length=4, layers=(0,)),
        PromptConfig(length=4),
    )
    ids, mask = padded(ROWS)
    backward(model.encode(ids, mask, slots=torch.tensor([0, 2, 0, NO_SLOT])).hidden.square().sum())
    first, second, third = (p.grad for name, p in model.trainable() if name.startswith("bank."))
    assert first is not None
    assert third is not None
    assert (first.abs().amax(dim=(2, 3, 4)) > 0).all()
    assert (third.abs().amax(dim=(2, 3, 4)) > 0).all()
    assert second is None


def prompt_keep(indices: Sequence[int]) -> Tensor:
    """Return what a dropout of a half leaves of a prompt."""
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(len(indices), 2, 4, LENGTH, 8, generator=generator) >= 0.5) * 2.0


@pytest.mark.parametrize("dropout", [False, True])
@depths
@every_model
def test_depth_recomputed_activations_give_the_same_gradients(
    loaded: Loaded,
    model_type: str,
    layers: PromptLayers,
    indices: list[int],
    dropout: bool,
) -> None:
    model = with_head(loaded(model_type)[0], PromptConfig(length=LENGTH, layers=layers), "mean")
    ids, mask = padded(ROWS)
    part = Part(
        slot=0,
        input_ids=ids,
        token_mask=mask,
        prompt_keep=prompt_keep(indices) if dropout else None,
        head_keep=torch.full((4, 32), 1.5) if dropout else None,
    )
    found = []
    for recompute in (False, True):
        with model.backbone.dropout(11 if dropout else None):
            (logits,) = model.answer([part], recompute=recompute)
            backward(logits.square().sum())
        found.append((logits.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert_equal(found[1][1], found[0][1])


def test_depth_recomputing_runs_the_prompted_layers_twice(backbone_folder: Folder) -> None:
    model = with_head(
        open_backbone(backbone_folder("bert")), PromptConfig(length=LENGTH, layers=2), "mean"
    )
    encoder: Any = model.backbone.model.encoder
    runs = [0, 0, 0]

    def count(place: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            runs[place] += 1

        return add

    for place, layer in enumerate(encoder.layer):
        layer.attention.register_forward_hook(count(place))
    ids, mask = padded(ROWS)
    part = Part(slot=0, input_ids=ids, token_mask=mask)
    backward(model.answer([part])[0].sum())
    assert runs == [1, 1, 1]
    backward(model.answer([part], recompute=True)[0].sum())
    # below the first prompt there is no backward pass to compute anything for
    assert runs == [2, 3, 3]


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_depth_training_with_recomputed_activations_is_the_same_training(
    backbone_folder: Folder, kind: str
) -> None:
    bench = Bench(backbone_folder("bert"), kind)
    changes = {
        "prompt": {"length": 4, "layers": 2, "dropout": 0.2},
        "head": {"dropout": 0.2},
        "backbone_dropout": True,
    }
    kept, kept_reports = bench.run(settings(**changes))
    again, again_reports = bench.run(settings(**changes, gradient_checkpointing=True))
    assert [r.train_loss for r in again_reports] == [r.train_loss for r in kept_reports]
    assert epoch_rows(again_reports) == epoch_rows(kept_reports)
    assert_equal(weights(again), weights(kept))


# The last layer for the first token alone


@pytest.mark.parametrize("reads", ["cls", "pooler"])
@depths
@every_model
def test_depth_last_layer_of_the_first_token_alone_gives_the_same(
    loaded: Loaded,
    model_type: str,
    layers: PromptLayers,
    indices: list[int],
    reads: Reading,
) -> None:
    backbone, _ = loaded(model_type)
    if reads == "pooler" and not backbone.spec.has_pooler:
        assert model_type == "electra"
        return
    model = with_head(backbone, PromptConfig(length=LENGTH, layers=layers), reads)
    ids, mask = padded(ROWS)
    part = Part(slot=0, input_ids=ids, token_mask=mask, prompt_keep=prompt_keep(indices))
    found = []
    for trims in (False, True):
        model.trims_last_layer = trims
        (logits,) = model.answer([part])
        backward(logits.square().sum())
        found.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-5)
    for name, wanted in found[0][1].items():
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(found[1][1][name], wanted, atol=1e-6, rtol=1e-5)


def last_outputs(model: PromptedModel) -> list[int]:
    """Return a list that receives for how many tokens the last layer's feed-forward ran."""
    encoder: Any = model.backbone.model.encoder
    tokens: list[int] = []
    encoder.layer[-1].intermediate.register_forward_hook(
        lambda _, args, __: tokens.append(args[0].shape[1])
    )
    return tokens


@pytest.mark.parametrize(
    ("readings", "width"),
    [
        (["cls"], 1),
        (["pooler"], 1),
        (["cls", "pooler"], 1),
        (["mean"], 8),
        (["tokens"], 8),
        (["cls", "mean"], 8),
    ],
)
def test_depth_last_layer_computes_what_the_heads_read(
    backbone_folder: Folder, readings: list[Reading], width: int
) -> None:
    model = with_head(
        open_backbone(backbone_folder("bert")), PromptConfig(length=LENGTH), *readings
    )
    tokens = last_outputs(model)
    ids, mask = padded(ROWS)
    parts = [Part(slot=k, input_ids=ids, token_mask=mask) for k in range(len(readings))]
    with torch.no_grad():
        together = model.answer(parts)
        assert tokens == [width]
        for part, got in zip(parts, together, strict=True):
            model.trims_last_layer = False
            (wanted,) = model.answer([part])
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert tokens[1:] == [8] * len(readings)


# Artifacts


def save(folder: Path, model: PromptedModel, config: TrainConfig) -> None:
    """Save the artifact of a model's first slot."""
    save_artifact(
        folder,
        Weights.of(model),
        task=task_of(),
        method="ptv2",
        prompt=config.prompt,
        head=HeadConfig(reads="cls"),
        backbone=model.backbone.spec.to_mapping(),
        tokenizer_digest="sha256:0",
        encoding={"max_length": 32},
        decoding={},
        training=config.to_mapping(),
        provenance={},
        metrics={},
        golden=[],
    )


@pytest.mark.parametrize(("layers", "indices"), [(2, [1, 2]), ([0, 2], [0, 2])])
def test_depth_artifact_survives_a_round_trip(
    tmp_path: Path, backbone_folder: Folder, layers: int | list[int], indices: list[int]
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    config = settings(prompt={"length": 4, "layers": layers})
    model = new_model(bench.backbone, bench.task, config, bench.train).eval()
    save(tmp_path / "prompt", model, config)
    manifest = load_manifest(tmp_path / "prompt")
    assert manifest.prompt == config.prompt
    assert manifest.shapes()["prompt"] == [len(indices), 2, 4, 4, 8]
    loaded = load_weights(tmp_path / "prompt", manifest)
    assert torch.equal(loaded.prompt, model.bank.flatten(0))
    again = restore_model(
        open_backbone(bench.folder), [(manifest.task, manifest.prompt, manifest.head, loaded)]
    )
    with torch.no_grad():
        assert torch.equal(again(*padded(ROWS)), model(*padded(ROWS)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("all", r"expected tensors \{'prompt': \[3, 2, 4, 4, 8\].* got \{.*\[2, 2, 4, 4, 8\]"),
        (1, r"expected tensors \{'prompt': \[1, 2, 4, 4, 8\]"),
        ([0], r"expected tensors \{'prompt': \[1, 2, 4, 4, 8\]"),
        (4, "prompt.layers: expected `all`, a number of top layers from 1 to 3"),
        ([3], "prompt.layers: expected `all`, a number of top layers from 1 to 3"),
        ([[1]], "prompt.layers: expected all, a number of top layers"),
    ],
)
def test_depth_artifact_of_other_layers_is_refused(
    tmp_path: Path, backbone_folder: Folder, layers: Any, message: str
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    config = settings(prompt={"length": 4, "layers": 2})
    save(tmp_path / "prompt", bench.model(config), config)
    file = tmp_path / "prompt" / "prompt.json"
    values = json.loads(file.read_text())
    values["prompt"]["layers"] = layers
    file.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=message):
        load_manifest(tmp_path / "prompt")


# Settings


@pytest.mark.parametrize(
    ("given", "kept"),
    [("all", "all"), (1, 1), (24, 24), ([0], (0,)), ([2, 0], (0, 2)), ((1, 2), (1, 2))],
)
def test_depth_setting_survives_json(given: Any, kept: PromptLayers) -> None:
    config = TrainConfig.from_mapping({"prompt": {"layers": given}})
    assert config.prompt.layers == kept
    assert TrainConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


@pytest.mark.parametrize(
    "given",
    [0, -1, True, False, 1.0, None, "top", "", [], [1, 1], [0.5], [-1], [True], ["0"], [[1]], {}],
)
def test_depth_setting_that_names_no_layers_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_mapping({"prompt": {"layers": given}, "epochs": 0})
    problems = dict(caught.value.problems)
    assert problems["train.prompt.layers"] == (
        f"expected all, a number of top layers >= 1, or a list of layers, got {given!r}"
    )
    assert "train.epochs" in problems


@pytest.mark.parametrize("layers", [4, (3,), (0, 3), (-1,)])
def test_depth_beyond_the_backbone_is_refused(
    backbone_folder: Folder, layers: PromptLayers
) -> None:
    config = PromptConfig(layers=layers)
    with pytest.raises(ConfigError, match=r"from 1 to 3, or a list of layers from 0 to 2, .* got"):
        config.layer_indices(3)
    with pytest.raises(ConfigError, match=r"train\.prompt\.layers"):
        make_prompt(open_backbone(backbone_folder("bert")).spec.shape, config, seed=0)


def test_depth_training_moves_the_chosen_layers_and_learns(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    config = settings(
        prompt={"length": 4, "layers": 2},
        head={"reads": "mean"},
        epochs=24,
        learning_rate=0.2,
        patience=24,
    )
    before = bench.model(config).bank.flatten(0)
    model, reports = bench.run(config)
    moved = (model.bank.flatten(0) - before).abs().amax(dim=(1, 2, 3, 4))
    assert moved.shape == (2,)
    assert (moved > 1e-2).all()
    # a third of the labels is what guessing gets
    assert max(score for _, _, score in epoch_rows(reports)) > 0.8


def test_depth_training_of_all_layers_by_number_or_list_is_the_same(
    backbone_folder: Folder,
) -> None:
    bench = Bench(backbone_folder("bert"))
    wanted, _ = bench.run(settings(prompt={"length": 4}))
    for layers in (3, [0, 1, 2]):
        got, _ = bench.run(settings(prompt={"length": 4, "layers": layers}))
        assert_close(weights(got), weights(wanted), atol=0.0)
