"""A backbone in int8 answers like the one it was rounded from, each row for itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptv2_core.config import Precision, PromptConfig, TrainConfig
from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones import loading
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.quantized import Int8Linear, quantize
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.fit import fit
from ptv2_core.training.start import new_model
from ptv2_core.training.trunk import TrunkCache
from tests.tiny import encode_for, examples_of, task_of, tiny_language_model

Folder = Callable[[str], Path]


def linear(inputs: int = 24, outputs: int = 40) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def test_int8_linear_equals_whole_number_arithmetic() -> None:
    given = linear()
    states = torch.randn(5, 24)
    weight = given.weight.detach()
    by_output, by_row = weight.abs().amax(1) / 127, states.abs().amax(1) / 127
    # exact in float64: sums of products of whole numbers
    numbers = (weight / by_output[:, None]).round().double()
    rows = (states / by_row[:, None]).round().double()
    expected = (rows @ numbers.T) * by_row[:, None] * by_output + given.bias
    before = states.clone()
    found = Int8Linear(given)(states)
    assert torch.equal(states, before)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, given(states), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_answers_a_row_alike_alone_and_among_others(dtype: torch.dtype) -> None:
    layer = Int8Linear(linear())
    states = torch.randn(3, 7, 24) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    states = states.to(dtype)
    whole = layer(states)
    assert whole.shape == (3, 7, 40)
    assert whole.dtype == states.dtype
    for row in range(3):
        assert torch.equal(layer(states[row : row + 1]), whole[row : row + 1])


def test_int8_linear_of_zeros_is_its_bias() -> None:
    given = linear()
    assert torch.equal(Int8Linear(given)(torch.zeros(1, 24))[0], given.bias)


def test_int8_of_gpt2s_own_layer_is_that_of_the_linear_layer() -> None:
    given = linear()
    turned = Conv1D(40, 24)
    turned.weight.data.copy_(given.weight.data.T)
    turned.bias.data.copy_(given.bias.data)
    model = nn.Sequential(turned)
    quantize(model)
    states = torch.randn(3, 5, 24)
    assert torch.equal(model(states), Int8Linear(given)(states))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_backbone_in_int8_is_close_to_fp32(
    model_type: str, backbone_folder: Folder, family_folder: Folder
) -> None:
    name = str((family_folder if model_type == "gpt2" else backbone_folder)(model_type))
    ids, mask = torch.arange(5, 17).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    found = {}
    for precision in ("fp32", "int8"):
        backbone = load_backbone(name, device="cpu", precision=precision)
        model = PromptedModel(backbone, PromptBank(backbone.spec.shape), [])
        with torch.no_grad():
            found[precision] = model.encode(ids, mask, slots=-1).hidden
    similar = torch.cosine_similarity(found["fp32"], found["int8"], dim=-1)
    assert float(similar.min()) > 0.99
    assert not torch.equal(found["fp32"], found["int8"])


def test_backbone_of_gpt2_in_int8_keeps_no_layer_as_it_was(family_folder: Folder) -> None:
    backbone = load_backbone(str(family_folder("gpt2")), device="cpu", precision="int8")
    found = [type(module) for module in backbone.model.modules()]
    assert found.count(Int8Linear) == 3 * 4
    assert not {nn.Linear, Conv1D} & set(found)


def test_backbone_in_int8_is_not_tuned(backbone_folder: Folder) -> None:
    name = str(backbone_folder("bert"))
    with pytest.raises(BackboneError, match="int8 rounds the weights for good, and fine-tuning"):
        load_backbone(name, device="cpu", precision="int8", tunable=True)
    with pytest.raises(BackboneError, match="fine-tuning needs the weights in fp32"):
        load_backbone(name, device="cpu", precision="int8", packs=False).tunable_copy()


def test_backbone_in_int8_takes_no_training_of_prompts(backbone_folder: Folder) -> None:
    folder = backbone_folder("bert")
    backbone = load_backbone(str(folder), device="cpu", precision="int8")
    task = task_of()
    rows = encode_for(folder, examples_of("classification", 6), task)
    config = TrainConfig(prompt=PromptConfig(length=2), epochs=1)
    model = new_model(backbone, task, config, rows)
    with pytest.raises(BackboneError, match="int8 on a CPU has no gradient"):
        next(iter(fit(model, task=task, train=rows, dev=rows, config=config)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backbone_in_int8_answers_a_verbalizer(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_is_fast_at_bf16", lambda _: dtype == torch.bfloat16)
    name = str(tiny_language_model(tmp_path))
    ids, mask = torch.arange(5, 17).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    found = {}
    for precision in ("fp32", "int8"):
        backbone = load_backbone(name, device="cpu", precision=precision, language_model=True)
        model = PromptedModel(backbone, PromptBank(backbone.spec.shape), [])
        with torch.no_grad():
            found[precision] = model.encode(
                ids, mask, slots=-1, read_at=torch.tensor([1, 2])
            ).masked
    assert backbone.number_format == f"int8+{str(dtype).removeprefix('torch.')}"
    assert torch.cosine_similarity(found["fp32"], found["int8"], dim=-1).min() > 0.98


# Formats by name


def formats(folder: Path) -> dict[Precision, Backbone]:
    names: tuple[Precision, ...] = ("fp32", "bf16", "int8")
    return {one: load_backbone(str(folder), device="cpu", precision=one) for one in names}


def test_backbone_has_one_file_digest_and_an_answering_digest_for_each_format(
    backbone_folder: Folder,
) -> None:
    found = formats(backbone_folder("bert"))
    assert len({one.spec.digest for one in found.values()}) == 1
    assert found["fp32"].answering_digest == found["fp32"].spec.digest
    digests = {one.answering_digest for one in found.values()}
    assert len(digests) == 3
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)
    assert [one.number_format for one in found.values()][:2] == ["float32", "bfloat16"]
    assert found["int8"].number_format.startswith("int8+")
    assert {one.spec.num_parameters for one in found.values()} == {
        sum(p.numel() for p in found["fp32"].model.parameters())
    }


def test_backbone_says_what_its_weights_take(
    backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_is_fast_at_bf16", lambda _: False)
    found = formats(backbone_folder("bert"))
    model = found["fp32"].model
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(one.weight.numel() for one in linears)
    outputs = sum(one.out_features for one in linears)
    buffers = sum(one.nbytes for one in model.buffers())
    total = sum(p.numel() for p in model.parameters())
    assert found["fp32"].size_bytes == 4 * total + buffers
    assert found["bf16"].size_bytes == 2 * total + buffers
    # a scale for each output
    assert found["int8"].size_bytes == 4 * (total - weights) + weights + 4 * outputs + buffers


def test_trunk_cache_mixes_no_formats(backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder("bert")
    rows = encode_for(folder, examples_of("classification", 4), task_of())
    cache = TrunkCache(tmp_path, limit_bytes=10**7)
    # the last two have states of one dtype where bf16 is fast, the others where it is not
    kept = [cache.states(backbone, rows, 2) for backbone in formats(folder).values()]
    assert None not in kept
    assert len(list(tmp_path.glob("*.npy"))) == 3
