"""Prompts as PEFT adapters: PEFT itself computes what is expected."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptv2_core.config import PromptConfig
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import sha256_file
from ptv2_core.interchange.export import export_peft
from ptv2_core.interchange.importing import import_peft
from tests.core.interchange_parts import (
    FAMILIES,
    LABELS,
    TYPES,
    Folder,
    a_task,
    assert_equal,
    load_peft,
    ours,
    prompt_of,
    run_readme,
    theirs,
)
from tests.tiny import tiny_backbone, without_pooler


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(LABELS))
def test_export_gives_pefts_logits_and_comes_back_as_the_same_bytes(
    family: str, kind: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder(family), a_task(kind)
    prompt = prompt_of(tmp_path / "prompt", backbone, task, token_types=kind != "qa")
    exported = export_peft(prompt, tmp_path / "peft")
    assert exported.task_type == TYPES[kind]
    batch, expected = ours(Predictor.load(prompt, device="cpu", precision="fp32"))
    assert_equal(theirs(load_peft(tmp_path / "peft", backbone, task), batch), expected, batch)

    import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    first, second = (tmp_path / name / "prompt.safetensors" for name in ("prompt", "back"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_export_of_a_task_on_pairs_gives_pefts_logits(
    family: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder(family), a_task("classification", has_pairs=True)
    prompt = prompt_of(tmp_path / "prompt", backbone, task)
    export_peft(prompt, tmp_path / "peft")
    batch, expected = ours(Predictor.load(prompt, device="cpu", precision="fp32"))
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.any()
    assert_equal(theirs(load_peft(tmp_path / "peft", backbone, task), batch), expected, batch)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_export_of_a_head_on_the_pooler_gives_pefts_logits_and_comes_back(
    family: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder(family), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="pooler")
    exported = export_peft(prompt, tmp_path / "peft")
    assert exported.notes == ()
    batch, expected = ours(Predictor.load(prompt, device="cpu", precision="fp32"))
    assert_equal(theirs(load_peft(tmp_path / "peft", backbone, task), batch), expected, batch)
    manifest = import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    assert manifest.head.reads == "pooler"
    first, second = (tmp_path / name / "prompt.safetensors" for name in ("prompt", "back"))
    assert first.read_bytes() == second.read_bytes()


def test_export_of_a_backbone_without_a_pooler_brings_one_that_changes_nothing(
    tmp_path: Path,
) -> None:
    backbone, task = without_pooler(tiny_backbone(tmp_path / "bare")), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task)
    exported = export_peft(prompt, tmp_path / "peft")
    assert "lost in fp16" in exported.notes[0]
    batch, expected = ours(Predictor.load(prompt, device="cpu", precision="fp32"))
    assert_equal(theirs(load_peft(tmp_path / "peft", backbone, task), batch), expected, batch)


def test_export_without_head_gives_the_hidden_states_that_peft_gives(
    tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder("bert"), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="mean")
    exported = export_peft(prompt, tmp_path / "peft", with_head=False)
    assert exported.task_type == "FEATURE_EXTRACTION"
    assert "reads the mean over all tokens but padding" in exported.notes[0]
    predictor = Predictor.load(prompt, device="cpu", precision="fp32")
    batch, logits = ours(predictor)
    model = load_peft(tmp_path / "peft", backbone, task)
    with torch.no_grad():
        encoded = predictor.model.encode(batch.input_ids, batch.token_mask)
        answer = model(input_ids=batch.input_ids, attention_mask=batch.token_mask.long())
    assert_equal(answer.last_hidden_state, encoded.hidden, batch)

    with pytest.raises(ArtifactError, match="an adapter for hidden states has no head"):
        import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    import_peft(tmp_path / "peft", tmp_path / "back", task=task, with_head=False)
    first, second = (
        load_file(tmp_path / name / "prompt.safetensors") for name in ("prompt", "back")
    )
    assert torch.equal(first["prompt"], second["prompt"])
    assert not torch.equal(first["head.weight"], second["head.weight"])
    assert logits.shape == (3, 3)


def test_export_readme_holds_code_that_runs(tmp_path: Path, backbone_folder: Folder) -> None:
    backbone, task = backbone_folder("bert"), a_task("tagging")
    prompt = prompt_of(tmp_path / "prompt", backbone, task)
    export_peft(prompt, tmp_path / "peft")
    files = sorted(file.name for file in (tmp_path / "peft").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    found = run_readme(tmp_path / "peft")
    batch, expected = ours(Predictor.load(prompt, device="cpu", precision="fp32"))
    assert_equal(theirs(found["model"], batch), expected, batch)
    assert found["model"].config.id2label == dict(enumerate(LABELS["tagging"]))


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_export_of_questions_with_token_types_brings_code_that_gets_them_through(
    family: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    backbone, task = backbone_folder(family), a_task("qa")
    prompt = prompt_of(tmp_path / "prompt", backbone, task)
    exported = export_peft(prompt, tmp_path / "peft")
    assert any("PEFT drops token_type_ids" in note for note in exported.notes)
    batch, expected = ours(Predictor.load(prompt, device="cpu", precision="fp32"))
    found = run_readme(tmp_path / "peft")
    # what the code is for: PEFT takes the types, and gives what it gives without them
    assert (theirs(found["model"], batch) - expected)[batch.token_mask].abs().max() > 0.1
    with torch.no_grad():
        answer = found["model"](
            inputs_embeds=found["embedded"](batch.input_ids, batch.token_type_ids),
            attention_mask=batch.token_mask.long(),
        )
    logits = torch.stack([answer.start_logits, answer.end_logits], dim=-1)
    assert_equal(logits, expected, batch)


def test_export_refuses_token_types_that_cannot_get_through(
    tmp_path: Path, backbone_folder: Folder
) -> None:
    prompt = prompt_of(tmp_path / "prompt", backbone_folder("roberta"), a_task("qa"))
    with pytest.raises(ArtifactError, match="drops token_type_ids in tasks of type QUESTION_ANS"):
        export_peft(prompt, tmp_path / "peft")


def test_export_names_the_backbone_as_it_is_told(tmp_path: Path, backbone_folder: Folder) -> None:
    backbone = backbone_folder("bert")
    prompt = prompt_of(tmp_path / "prompt", backbone, a_task("qa"))
    for base, expected in ((None, str(backbone)), ("some/bert", "some/bert")):
        export_peft(prompt, tmp_path / "peft", base_model=base)
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


@pytest.mark.parametrize(
    ("reads", "prompt", "message"),
    [
        ("mean", PromptConfig(length=5), "reads the mean over all tokens.*train.head.reads: cls"),
        ("cls", PromptConfig(length=5, layers=2), "layers 1, 2 of 3; .*train.prompt.layers: all"),
        ("cls", PromptConfig(length=5, layers=(0, 2)), "layers 0, 2 of 3"),
        ("cls", PromptConfig(length=5, shift_positions=False), "shift_positions: false; .* at 5"),
    ],
)
def test_export_refuses_what_peft_cannot_say(
    reads: str, prompt: PromptConfig, message: str, tmp_path: Path, backbone_folder: Folder
) -> None:
    task = a_task("classification")
    saved = prompt_of(
        tmp_path / "prompt", backbone_folder("bert"), task, reads=reads, prompt=prompt
    )
    with pytest.raises(ArtifactError, match=message):
        export_peft(saved, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_export_refuses_a_choice_of_options(tmp_path: Path, backbone_folder: Folder) -> None:
    task = TaskSpec(
        name="tiny",
        kind="multiple_choice",
        labels=(),
        fields={"text": "premise", "choices": "choice1, choice2", "label": "label"},
        metric=METRICS["multiple_choice"],
        template="joined",
    )
    prompt = prompt_of(tmp_path / "prompt", backbone_folder("bert"), task)
    with pytest.raises(ArtifactError, match="tasks that choose one of several options"):
        export_peft(prompt, tmp_path / "peft")
    assert export_peft(prompt, tmp_path / "peft", with_head=False).size_bytes > 0


def test_export_refuses_another_method(tmp_path: Path, backbone_folder: Folder) -> None:
    prompt = prompt_of(tmp_path / "prompt", backbone_folder("bert"), a_task("qa"))
    file = prompt / "prompt.json"
    file.write_text(file.read_text().replace('"method": "ptv2"', '"method": "probe"'))
    tensors = load_file(prompt / "prompt.safetensors")
    del tensors["prompt"]
    save_file(tensors, prompt / "prompt.safetensors")
    values = json.loads(file.read_text())
    values["sha256"] = sha256_file(prompt / "prompt.safetensors")
    file.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="expected a prompt of method ptv2.* got probe"):
        export_peft(prompt, tmp_path / "peft")


def test_export_and_import_replace_only_their_own(tmp_path: Path, backbone_folder: Folder) -> None:
    task = a_task("qa")
    prompt = prompt_of(tmp_path / "prompt", backbone_folder("bert"), task)
    export_peft(prompt, tmp_path / "peft")
    export_peft(prompt, tmp_path / "peft")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"expected a new folder, .*; got thesis.txt"):
        export_peft(prompt, tmp_path / "mine")
    with pytest.raises(ArtifactError, match=r"expected a new folder, .*; got thesis.txt"):
        import_peft(tmp_path / "peft", tmp_path / "mine", task=task)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
