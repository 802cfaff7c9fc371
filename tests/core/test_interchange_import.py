"""PEFT adapters as prompts: PEFT itself computes what is expected."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ptv2_core.errors import ArtifactError, ConfigError, PTv2Error
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import sha256_file
from ptv2_core.interchange.export import export_peft
from ptv2_core.interchange.importing import import_peft, task_of
from tests.core.interchange_parts import (
    FAMILIES,
    Folder,
    a_task,
    assert_equal,
    change_config,
    change_tensors,
    ours,
    peft_of,
    theirs,
)
from tests.tiny import tiny_backbone, without_pooler


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tagging", "qa"])
def test_import_gives_pefts_logits_and_goes_out_as_the_same_tensors(
    family: str, kind: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder(family), a_task(kind)
    model = peft_of(tmp_path / "peft", backbone, task)
    manifest = import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    assert manifest.prompt.length == 6
    predictor = Predictor.load(tmp_path / "prompt", device="cpu", precision="fp32")
    predictor.verify_golden()
    batch, found = ours(predictor)
    assert_equal(found, theirs(model, batch), batch)

    export_peft(tmp_path / "prompt", tmp_path / "again")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again")
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("kind", "has_pairs"), [("classification", True), ("regression", False)])
def test_import_of_a_classifier_on_berts_pooler_gives_pefts_logits(
    kind: str, has_pairs: bool, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder("bert"), a_task(kind, has_pairs=has_pairs)
    model = peft_of(tmp_path / "peft", backbone, task)
    manifest = import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    assert manifest.head.reads == "pooler"
    batch, found = ours(Predictor.load(tmp_path / "prompt", device="cpu", precision="fp32"))
    expected = theirs(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1e-3


def test_import_of_a_projected_prompt_gives_pefts_logits(
    tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder("roberta"), a_task("tagging")
    model = peft_of(
        tmp_path / "peft", backbone, task, prefix_projection=True, encoder_hidden_size=16
    )
    import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    batch, found = ours(Predictor.load(tmp_path / "prompt", device="cpu", precision="fp32"))
    assert_equal(found, theirs(model, batch), batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_import_of_half_precision_keeps_every_number(
    dtype: torch.dtype, tmp_path: Path, backbone_folder: Folder
) -> None:
    task = a_task("tagging")
    peft_of(tmp_path / "peft", backbone_folder("bert"), task)
    change_tensors(
        tmp_path / "peft", lambda t: t.update({name: v.to(dtype) for name, v in t.items()})
    )
    import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    found = load_file(tmp_path / "prompt" / "prompt.safetensors")
    assert torch.equal(found["head.weight"], stored["base_model.classifier.weight"].float())
    # [L, 2, N, P, D]: position 2 of the values of layer 1
    flat = stored["prompt_embeddings"].float()[2].view(3, 2, 4, 8)
    assert torch.equal(found["prompt"][1, 1, :, 2], flat[1, 1])


def test_import_says_where_a_prompt_came_from(tmp_path: Path, backbone_folder: Folder) -> None:
    task = a_task("qa")
    peft_of(tmp_path / "peft", backbone_folder("bert"), task)
    manifest = import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    assert manifest.provenance["peft"] == {
        "sha256": sha256_file(tmp_path / "peft" / "adapter_model.safetensors"),
        "task_type": "QUESTION_ANS",
        "base_model": str(backbone_folder("bert")),
        "version": json.loads((tmp_path / "peft" / "adapter_config.json").read_text())[
            "peft_version"
        ],
        "has_head": True,
    }
    # 64 positions, 6 of them for the prompt
    assert manifest.encoding == {"max_length": 58, "stride": 14, "token_types": False}
    assert [example["input"] for example in manifest.golden]


@pytest.mark.parametrize("family", ["roberta", "electra"])
def test_import_refuses_a_head_of_two_layers_and_takes_the_prompt_alone(
    family: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder(family), a_task("classification")
    peft_of(tmp_path / "peft", backbone, task)
    with pytest.raises(ArtifactError, match=r"two trained layers.*--without-head .*init_from"):
        import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    import_peft(tmp_path / "peft", tmp_path / "prompt", task=task, with_head=False)
    Predictor.load(tmp_path / "prompt", device="cpu", precision="fp32").verify_golden()


def test_import_refuses_a_classifier_whose_pooler_is_lost(tmp_path: Path) -> None:
    backbone, task = without_pooler(tiny_backbone(tmp_path / "bare")), a_task("classification")
    peft_of(tmp_path / "peft", backbone, task)
    with pytest.raises(ArtifactError, match=r"random one, which is lost.*modules_to_save"):
        import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)


Edit = Callable[[Path], object]
REFUSED: Mapping[str, tuple[Edit, str]] = {
    "method": (lambda f: change_config(f, peft_type="LORA"), "expected PREFIX_TUNING.*'LORA'"),
    "type": (lambda f: change_config(f, task_type="CAUSAL_LM"), "expected SEQ_CLS .*'CAUSAL_LM'"),
    "other type": (lambda f: change_config(f, task_type="SEQ_CLS"), "goes with --kind class"),
    "no number": (lambda f: change_config(f, num_layers="3"), "num_layers: expected a whole"),
    "huge": (lambda f: change_config(f, num_virtual_tokens=10**9), "from 1 to 4,096"),
    "heads": (lambda f: change_config(f, num_attention_heads=5), "multiple of num_attention_heads"),
    "decoder": (lambda f: change_config(f, num_transformer_submodules=2), "expected 1, of an enc"),
    "depth": (
        lambda f: (
            change_config(f, num_layers=2),
            change_tensors(
                f, lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:, :128].clone())
            ),
        ),
        "num_layers: expected 3, got 2.*--backbone",
    ),
    "length": (lambda f: change_config(f, num_virtual_tokens=5), "expected .5, 192., as adapter"),
    "no base": (lambda f: change_config(f, base_model_name_or_path=None), "--backbone"),
    "not a number": (
        lambda f: change_tensors(f, lambda t: t["prompt_embeddings"].fill_(float("nan"))),
        "expected finite numbers.*'prompt_embeddings'",
    ),
    "more modules": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.bert.x": torch.ones(1)})),
        r"other trained modules.*--without-head",
    ),
    "no head": (
        lambda f: change_tensors(f, lambda t: t.pop("base_model.classifier.bias")),
        "expected the head classifier.bias .3., classifier.weight .3, 32., got classifier.weight",
    ),
    "whole numbers": (
        lambda f: change_tensors(
            f, lambda t: t.update(prompt_embeddings=t["prompt_embeddings"].long())
        ),
        "expected F32 or F16 or BF16 tensors, got F32, I64",
    ),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-4]
        ),
        "not a safetensors file",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.bin, a pickle.*save_pretrained",
    ),
    "nothing": (lambda f: shutil.rmtree(f), "adapter_config.json: not there"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("[1]"), "expected a mapping"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_import_refuses(case: str, tmp_path: Path, backbone_folder: Folder, adapter: Path) -> None:
    edit, message = REFUSED[case]
    folder = shutil.copytree(adapter, tmp_path / "peft")
    edit(folder)
    with pytest.raises(PTv2Error) as caught:
        import_peft(folder, tmp_path / "prompt", task=a_task("tagging"))
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert not (tmp_path / "prompt").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Folder) -> Path:
    """Return an adapter for tagging that PEFT saved."""
    folder = tmp_path_factory.mktemp("adapter")
    peft_of(folder, backbone_folder("bert"), a_task("tagging"))
    return folder


def test_import_refuses_more_tokens_than_positions(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="6 prompt positions leave 58 of the 64.*got 59"):
        import_peft(adapter, tmp_path / "prompt", task=a_task("tagging"), max_length=59)


def test_import_refuses_labels_of_another_number(adapter: Path, tmp_path: Path) -> None:
    task = task_of("tiny", "tagging", ("O", "B-city"))
    with pytest.raises(ArtifactError, match="labels must be as many as the head has"):
        import_peft(adapter, tmp_path / "prompt", task=task)


@pytest.mark.parametrize(
    ("kind", "labels", "has_pairs", "message"),
    [
        ("srl", ("O", "B-V"), False, "--kind: expected classification"),
        ("qa", (), True, "--pair: expected for classification"),
        ("tagging", (), False, "task.labels: expected two or more"),
    ],
)
def test_task_of_refuses(kind: Any, labels: Any, has_pairs: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of("tiny", kind, labels, has_pairs=has_pairs)
