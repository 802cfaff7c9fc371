"""PEFT's format for decoders: heads on the last token, grouped queries, windows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.interchange.export import export_peft
from ptv2_core.interchange.importing import import_peft
from tests.core.interchange_parts import (
    DECODERS,
    TYPES,
    Folder,
    a_task,
    assert_equal,
    load_peft,
    ours,
    peft_of,
    prompt_of,
    run_readme,
    theirs,
)

# architectures for which Transformers has no such model
MISSING = (("opt", "tagging"), ("glm", "qa"), ("glm4", "qa"))
CASES = [(case, kind) for case in DECODERS for kind in sorted(TYPES) if (case, kind) not in MISSING]


def configured(folder: Path, **values: object) -> Path:
    """Edit a backbone's config.json in place; returns its folder."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.fixture(scope="module")
def decoder(family_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function from a case to its tiny backbone, without windows."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case != "qwen3":
            return family_folder(case)
        if case not in made:
            copied = shutil.copytree(family_folder(case), tmp_path_factory.mktemp("decoder") / case)
            kinds = ["full_attention"] * 3
            made[case] = configured(copied, use_sliding_window=False, layer_types=kinds)
        return made[case]

    return folder


def assert_same_logits(prompt: Path, model: object) -> None:
    """Compare a prompt with a model of PEFT's that wraps the same backbone."""
    predictor = Predictor.load(prompt, device="cpu", precision="fp32")
    predictor.verify_golden()
    batch, found = ours(predictor)
    assert_equal(found, theirs(model, batch, token_types=False), batch)


def same_bytes(first: Path, second: Path) -> bool:
    """Tell whether two prompts have the same weights."""
    one, other = (folder / "prompt.safetensors" for folder in (first, second))
    return one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_export_of_a_decoders_prompt_gives_pefts_logits_and_comes_back_as_the_same_bytes(
    case: str, kind: str, tmp_path: Path, decoder: Folder
) -> None:
    task = a_task(kind)
    prompt = prompt_of(tmp_path / "prompt", decoder(case), task, reads="last")
    assert export_peft(prompt, tmp_path / "peft").task_type == TYPES[kind]
    assert_same_logits(prompt, run_readme(tmp_path / "peft")["model"])
    import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    assert same_bytes(prompt, tmp_path / "back")


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_import_for_a_decoder_gives_pefts_logits_and_goes_out_as_the_same_tensors(
    case: str, kind: str, tmp_path: Path, decoder: Folder
) -> None:
    task = a_task(kind)
    model = peft_of(tmp_path / "peft", decoder(case), task)
    manifest = import_peft(tmp_path / "peft", tmp_path / "prompt", task=task)
    assert manifest.head.reads == "last"
    assert_same_logits(tmp_path / "prompt", model)
    export_peft(tmp_path / "prompt", tmp_path / "again")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again")
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_export_of_a_pair_on_a_decoder_gives_pefts_logits(tmp_path: Path, decoder: Folder) -> None:
    task = a_task("classification", has_pairs=True)
    prompt = prompt_of(tmp_path / "prompt", decoder("gpt2"), task, reads="last")
    export_peft(prompt, tmp_path / "peft")
    assert_same_logits(prompt, run_readme(tmp_path / "peft")["model"])


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_export_of_a_head_without_a_bias_needs_no_code(
    case: str, tmp_path: Path, decoder: Folder
) -> None:
    backbone, task = decoder(case), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last", has_bias=False)
    notes = export_peft(prompt, tmp_path / "peft").notes
    assert notes == (
        "The last token that is not 0 answers: pad with it, and let no row end with it.",
    )
    assert_same_logits(prompt, load_peft(tmp_path / "peft", backbone, task))
    import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    assert same_bytes(prompt, tmp_path / "back")


def test_export_of_a_head_with_a_bias_is_refused_by_peft_where_its_place_is_missing(
    tmp_path: Path, decoder: Folder
) -> None:
    backbone, task = decoder("llama"), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last")
    assert any(
        "last column of score.weight" in n for n in export_peft(prompt, tmp_path / "p").notes
    )
    with pytest.raises(RuntimeError, match="size mismatch for base_model.score"):
        load_peft(tmp_path / "p", backbone, task)


def test_export_names_the_padding_that_a_decoder_has_not(tmp_path: Path, decoder: Folder) -> None:
    backbone = shutil.copytree(decoder("gpt2"), tmp_path / "gpt2")
    configured(backbone, pad_token_id=None)
    prompt = prompt_of(tmp_path / "prompt", backbone, a_task("classification"), reads="last")
    export_peft(prompt, tmp_path / "peft")
    assert "pad_token_id=0)" in (tmp_path / "peft" / "README.md").read_text()
    assert_same_logits(prompt, run_readme(tmp_path / "peft")["model"])


def test_export_and_import_refuse_rows_that_end_with_the_padding(
    tmp_path: Path, decoder: Folder
) -> None:
    backbone, task = shutil.copytree(decoder("gpt2"), tmp_path / "gpt2"), a_task("classification")
    configured(backbone, pad_token_id=3)
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last")
    with pytest.raises(ArtifactError, match=r"rows end with token 3, .*--without-head"):
        export_peft(prompt, tmp_path / "peft")
    peft_of(tmp_path / "peft", backbone, task)
    with pytest.raises(ArtifactError, match=r"rows end with token 3, .*--without-head"):
        import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    import_peft(tmp_path / "peft", tmp_path / "back", task=task, with_head=False)
    assert export_peft(prompt, tmp_path / "alone", with_head=False).size_bytes > 0


def test_export_of_a_decoder_without_head_gives_the_hidden_states_that_peft_gives(
    tmp_path: Path, decoder: Folder
) -> None:
    backbone, task = decoder("llama"), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="mean")
    with pytest.raises(ArtifactError, match=r"reads the mean.*last token alone.*reads: last"):
        export_peft(prompt, tmp_path / "peft")
    exported = export_peft(prompt, tmp_path / "peft", with_head=False)
    assert exported.task_type == "FEATURE_EXTRACTION"
    predictor = Predictor.load(prompt, device="cpu", precision="fp32")
    batch, _ = ours(predictor)
    with torch.no_grad():
        expected = predictor.model.encode(batch.input_ids, batch.token_mask).hidden
    found = theirs(load_peft(tmp_path / "peft", backbone, task), batch, token_types=False)
    assert_equal(found, expected, batch)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    # 4 query heads of size 8 share 2 key heads
    assert (config["num_attention_heads"], config["token_dim"]) == (2, 16)


@pytest.mark.parametrize(("case", "kind"), MISSING)
def test_export_refuses_a_task_for_which_transformers_has_no_model(
    case: str, kind: str, tmp_path: Path, decoder: Folder
) -> None:
    prompt = prompt_of(tmp_path / "prompt", decoder(case), a_task(kind), reads="last")
    with pytest.raises(ArtifactError, match=f"has no {case} model for .*--without-head"):
        export_peft(prompt, tmp_path / "peft")
    assert export_peft(prompt, tmp_path / "peft", with_head=False).size_bytes > 0


def test_export_and_import_refuse_a_head_behind_a_projection(
    tmp_path: Path, family_folder: Folder
) -> None:
    backbone, task = family_folder("opt-350m"), a_task("classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last")
    with pytest.raises(ArtifactError, match=r"projected to 24 numbers.* of 32.*--without-head"):
        export_peft(prompt, tmp_path / "peft")
    exported = export_peft(prompt, tmp_path / "alone", with_head=False)
    assert any("as they were before, of 32" in note for note in exported.notes)
    peft_of(tmp_path / "peft", backbone, task)
    with pytest.raises(ArtifactError, match=r"projected to 24 numbers.* of 32.*--without-head"):
        import_peft(tmp_path / "peft", tmp_path / "back", task=task)
    import_peft(tmp_path / "peft", tmp_path / "back", task=task, with_head=False)


def test_export_and_import_keep_rows_inside_a_window(tmp_path: Path, decoder: Folder) -> None:
    backbone, task = shutil.copytree(decoder("qwen3"), tmp_path / "qwen3"), a_task("tagging")
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    configured(backbone, use_sliding_window=True, sliding_window=37, layer_types=kinds)
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last")
    export_peft(prompt, tmp_path / "peft")  # 5 positions and 32 tokens
    import_peft(tmp_path / "peft", tmp_path / "back", task=task, max_length=32)
    with pytest.raises(ConfigError, match="5 prompt positions leave 32 of the 37 .* in a window"):
        import_peft(tmp_path / "peft", tmp_path / "back", task=task, max_length=33)

    configured(backbone, sliding_window=8)
    narrow = prompt_of(tmp_path / "narrow", backbone, task, reads="last")
    with pytest.raises(ArtifactError, match="a token sees 8 positions.*at most 3 tokens"):
        export_peft(narrow, tmp_path / "refused")
    # which is so: the ends of long rows do not see all of the prompt under PEFT
    batch, found = ours(Predictor.load(narrow, device="cpu", precision="fp32"))
    under_peft = theirs(run_readme(tmp_path / "peft")["model"], batch, token_types=False)
    differs = (found - under_peft).abs().amax(dim=-1) > 1e-3
    assert differs[batch.token_mask].any()
    assert not differs[:, :3].any()
