"""Which precision rounds weights where, and bitsandbytes' layers under our prompts."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ptv2_core.config import Precision, PromptConfig, TrainConfig
from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones import loading, rounding
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.rounding import loading_arguments, number_format, rounding_of
from ptv2_core.training.fit import fit
from ptv2_core.training.start import new_model
from tests.tiny import encode_for, examples_of, task_of, tiny_model

Folder = Callable[[str], Path]
CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda:0", "mps"))
needs_bitsandbytes = pytest.mark.skipif(
    any(find_spec(name) is None for name in rounding.LIBRARIES),
    reason="the extra `quantized` is not installed",
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as if the libraries were there."""
    monkeypatch.setattr(rounding, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("precision", "device", "found"),
    [
        ("auto", CUDA, None), ("fp32", CPU, None), ("bf16", MPS, None), ("int8", CPU, "int8"),
        ("int8", CUDA, "bnb-int8"), ("nf4", CUDA, "bnb-nf4"),
    ],
)  # fmt: skip
def test_rounding_is_ours_on_a_cpu_and_bitsandbytes_on_cuda(
    precision: Precision, device: torch.device, found: str | None
) -> None:
    assert rounding_of(precision, device) == found


@pytest.mark.parametrize(
    ("precision", "device", "said"),
    [
        ("nf4", CPU, "nf4 needs a CUDA card, got device cpu; choose int8 (to answer), bf16 or"),
        ("nf4", MPS, "nf4 needs a CUDA card, got device mps; choose bf16 or fp32"),
        ("int8", MPS, "int8 needs a CPU or a CUDA card, got device mps; choose bf16 or fp32"),
    ],
)
def test_rounding_says_which_device_it_needs(
    precision: Precision, device: torch.device, said: str
) -> None:
    with pytest.raises(BackboneError) as error:
        rounding_of(precision, device)
    assert said in str(error.value)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_rounding_is_not_for_weights_that_are_trained(
    precision: Precision, device: torch.device
) -> None:
    with pytest.raises(BackboneError, match=f"{precision} rounds the weights for good"):
        rounding_of(precision, device, tunable=True)


def test_rounding_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rounding, "find_spec", lambda name: None if name == "bitsandbytes" else object()
    )
    with pytest.raises(BackboneError) as error:
        rounding_of("nf4", CUDA)
    assert "not installed: bitsandbytes; run `pip install 'ptv2[quantized]'`" in str(error.value)


def test_rounding_to_8_bits_on_cuda_lets_rows_alone() -> None:
    arguments = loading_arguments("bnb-int8", torch.bfloat16, CUDA)
    assert arguments["device_map"] == {"": CUDA}
    config = arguments["quantization_config"]
    assert config.load_in_8bit
    # with outliers of the whole batch apart, rows would depend on each other
    assert config.llm_int8_threshold == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_4_bits_computes_in_the_format_of_the_states(dtype: torch.dtype) -> None:
    config = loading_arguments("bnb-nf4", dtype, CUDA)["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == dtype


def test_rounding_of_our_own_asks_transformers_for_nothing() -> None:
    assert loading_arguments("int8", torch.float32, CPU) == {}
    assert loading_arguments(None, torch.float32, CPU) == {}


def test_rounding_is_in_the_name_of_a_format() -> None:
    assert number_format(None, torch.bfloat16) == "bfloat16"
    assert number_format("bnb-nf4", torch.float32) == "bnb-nf4+float32"


# bitsandbytes itself, by its layers for CPUs: slow there, but the same modules as on a card


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backbone]:
    """Return a function that loads a backbone on the CPU, rounded as it would be on CUDA."""
    monkeypatch.setattr(loading, "_is_fast_at_bf16", lambda _: False)
    if find_spec("bitsandbytes") is not None:
        # a layout of its own for such CPUs, which layers as narrow as these do not fit
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

    def load(folder: Path, precision: Precision) -> Backbone:
        name = {"int8": "bnb-int8", "nf4": "bnb-nf4"}.get(precision)
        monkeypatch.setattr(loading, "rounding_of", lambda *_, **__: name)
        return load_backbone(str(folder), device="cpu", precision=precision)

    return load


def layers(backbone: Backbone, kind: str) -> list[torch.nn.Module]:
    return [one for one in backbone.model.modules() if type(one).__name__ == kind]


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """Return what a layer's rounded weight stands for, by its effect on unit vectors."""
    width = layer.in_features
    with torch.no_grad():
        product = layer(torch.eye(width, dtype=torch.float32))
    return product - layer.bias


@needs_bitsandbytes
@pytest.mark.parametrize(("precision", "kind"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
@pytest.mark.parametrize("case", ["bert", "gpt2", "deberta-v3", "modernbert", "llama"])
def test_bitsandbytes_rounds_every_family_and_passes_the_check_at_load(
    on_cpu: Callable[..., Backbone], backbone_folder: Folder, family_folder: Folder,
    case: str, precision: Precision, kind: str,
) -> None:  # fmt: skip
    folder = (backbone_folder if case == "bert" else family_folder)(case)
    exact, rounded = on_cpu(folder, "fp32"), on_cpu(folder, precision)
    replaced = {name for name, one in rounded.model.named_modules() if type(one).__name__ == kind}
    wanted = {
        name
        for name, one in exact.model.named_modules()
        if type(one).__name__ in ("Linear", "Conv1D")
    }
    assert replaced == wanted
    assert rounded.number_format == f"bnb-{precision}+float32"
    assert rounded.answering_digest != exact.answering_digest
    assert rounded.spec == exact.spec
    assert rounded.size_bytes < exact.size_bytes


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_bitsandbytes_prompts_learn_through_rounded_weights(
    on_cpu: Callable[..., Backbone], backbone_folder: Folder, precision: Precision
) -> None:
    folder = backbone_folder("bert")
    rounded = on_cpu(folder, precision)
    task = task_of()
    train, dev = (
        encode_for(folder, examples_of("classification", n, seed=n), task) for n in (30, 12)
    )
    before = {name: one.clone() for name, one in rounded.model.named_parameters()}
    config = TrainConfig.from_mapping(
        {"epochs": 6, "batch_size": 10, "learning_rate": 3e-2, "prompt": {"length": 4}}
    )
    model = new_model(rounded, task, config, train)
    reports = list(fit(model, task=task, train=train, dev=dev, config=config))
    losses = [record.train_loss for record in reports[-1].history]
    assert losses[-1] < losses[0] - 0.05
    for name, one in rounded.model.named_parameters():
        assert one.grad is None
        assert torch.equal(one, before[name]), name


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_bitsandbytes_gradients_of_prompts_are_those_of_the_weights_it_stands_for(
    on_cpu: Callable[..., Backbone], backbone_folder: Folder, precision: Precision
) -> None:
    folder = backbone_folder("bert")
    rounded, plain = on_cpu(folder, precision), on_cpu(folder, "fp32")
    kind = "Linear8bitLt" if precision == "int8" else "Linear4bit"
    for name, one in rounded.model.named_modules():
        if type(one).__name__ == kind:
            plain.model.get_submodule(name).weight.data.copy_(dequantized(one).T)
    ids = torch.tensor([[2, 7, 8, 3], [2, 11, 3, 0]])
    gradients = []
    for backbone in (rounded, plain):
        model = tiny_model(backbone, PromptConfig(length=4))
        model(ids, ids > 0).square().sum().backward()
        gradients.append(model.bank.slots[0].weight.grad)
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    # states are rounded to 8 bits, or multiplied in bf16 where the CPU has it
    assert difference < 0.1


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_bitsandbytes_answers_a_row_alike_alone_and_among_others(
    on_cpu: Callable[..., Backbone], backbone_folder: Folder, precision: Precision
) -> None:
    model = tiny_model(on_cpu(backbone_folder("bert"), precision), PromptConfig(length=4))
    ids = torch.tensor([[2, 7, 8, 3], [2, 11, 12, 3], [2, 9, 10, 3]])
    with torch.no_grad():
        whole = model(ids, ids > 0)
        for row in range(3):
            alone = model(ids[row : row + 1], ids[row : row + 1] > 0)
            torch.testing.assert_close(alone, whole[row : row + 1], atol=1e-4, rtol=1e-4)
